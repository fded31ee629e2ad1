"""What a trained adapter is worth: five task families and perplexity, base model beside adapter."""
