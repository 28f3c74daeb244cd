"""Experiments that test the claims of functional memory, one file each.

`subject.py` says what an experiment examines: any generator with any base. `embedded.py` is the subject inside the
package. `geometry.py` compares adapters, `intervals.py` says how sure a mean is, `report.py` writes what was found.
"""
