"""Small task worlds the project makes itself: requests, gold answers, demonstrations, a verifier."""
