"""Several processes under ``mlx.launch``: what they tell each other, and who is gone."""
