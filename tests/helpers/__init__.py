"""What tests share: tiny models, adapters, commands, and a stand-in for the Hub."""
