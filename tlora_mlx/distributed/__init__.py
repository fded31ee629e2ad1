"""Several processes under ``mlx.launch``: how they exchange data and notice that one has died."""
