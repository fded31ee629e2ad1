"""How good an adapter is: five task families and perplexity, base model and adapter compared."""
