"""The only code that touches the world: GPU, processes, network, disk, clock."""
