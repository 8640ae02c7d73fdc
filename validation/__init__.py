"""Theory against engine against autograd, and the ledger of the paper's claims.

`python -m validation` writes the ledger; `python -m validation --claim E28` shows one claim.

`validation.checks`   one check per claim, registered under the claim's id
`validation.studies`  measured sizes: the printed form's error, the Gauss-Newton split, estimators, dynamics
`validation.evidence` what a check found, and the verdict that follows from it
`validation.ledger`   all claims with their evidence; `validation.report` shows it
"""
