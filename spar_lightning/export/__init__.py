"""Students in the formats of other libraries, each checked by that library before it is handed over.

A recipe belongs to one library and one family of backbones. Its Python code stands in the README of the export
and is what the check runs, in a process that never imports this package: what a reader copies is what was tested.
"""

from spar_lightning.export.exporter import LIBRARIES as LIBRARIES
from spar_lightning.export.exporter import export as export
from spar_lightning.export.parity import ExportError as ExportError
