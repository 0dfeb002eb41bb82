"""Must not be imported: the real package asks for torchvision here."""

raise ImportError("the package as a whole was imported")
