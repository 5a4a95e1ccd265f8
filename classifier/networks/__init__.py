"""Networks besides the script's own: the references', torchvision's and a user's."""
