"""HTTP building blocks that gateway and pools share."""
