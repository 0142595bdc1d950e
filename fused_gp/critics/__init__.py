"""What is known of a critic, by watching it run: its modules, its autograd graph, batch normalisation, DDP and FSDP."""
