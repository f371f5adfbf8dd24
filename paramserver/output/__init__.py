"""What a run leaves and shows: its folder, its display, its picture."""
