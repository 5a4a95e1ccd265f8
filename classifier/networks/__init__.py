"""Networks besides the script's own: the references', torchvision's, timm's and a user's."""
