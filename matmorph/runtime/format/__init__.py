"""What matmorph's files hold: names, versions and records of an artefact folder, a training folder and an adapter file, and how a file is
read at all (`reading`, `folder`).

Written by the exporters and read by the runtime and the reports, through the same classes. Nothing here needs torch, so that every room may
import it.
"""
