"""What tests share: tiny models, adapters, commands, and the Hub on the loopback."""
