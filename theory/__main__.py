"""`python -m theory E27`: the symbolic check of one equation of the paper, derived minus displayed."""

from __future__ import annotations

import sys


def main(arguments: list[str]) -> int:
    """Print the differences for the equations named (all of them if none is); 0 if the command made sense."""
    from hessdiag.errors import HessdiagError
    from theory.claims import BY_ID
    from theory.symbolic.lookup import DEFINITIONS, identities_for

    try:
        for name in arguments or [f"E{n}" for n in range(1, 34)]:
            equation = name.upper() if name.upper().startswith("E") else f"E{name}"
            rows = identities_for(equation)
            claim = BY_ID[equation]
            print(f"{equation} ({claim.where}): {claim.statement}\n    {claim.formula}")
            if equation in DEFINITIONS:
                print(f"    a definition, carried out by {DEFINITIONS[equation]}")
            for row in rows:
                verdict = "difference 0" if row.holds else f"derived - displayed = {row.difference}"
                print(f"    {row.statement}: {verdict}")
    except HessdiagError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
