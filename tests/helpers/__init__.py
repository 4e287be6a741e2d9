"""What several tests share: servers, made-up data and records, commands in processes of their own."""
