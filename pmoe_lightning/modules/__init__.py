"""What policies and critics are made of. Begin with ``distributions``: the squashed Gaussian mixture."""
