"""Toy networks shared by the theory tests."""

from isofast.paper.toy import Toy

EUCLIDEAN = {
    "euclidean": Toy(loss="euclidean"),
    "iso_euclidean": Toy(loss="iso_euclidean"),
    "euclidean_no_stop_gradient": Toy(loss="euclidean", stop_gradient=False),
    "euclidean_no_predictor": Toy(loss="euclidean", predictor=False),
}
COSINE = {
    "cosine": Toy(loss="cosine"),
    "iso_cosine": Toy(loss="iso_cosine"),
    "cosine_no_stop_gradient": Toy(loss="cosine", stop_gradient=False),
    "cosine_paper_gradient": Toy(loss="cosine", stop_gradient=False, paper_gradient=True),
    "cosine_no_predictor": Toy(loss="cosine", predictor=False),
}
