"""What clients send -> the server's next variables."""
