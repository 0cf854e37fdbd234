"""What every room uses: files written aside, tensors on disk, errors, processes."""
