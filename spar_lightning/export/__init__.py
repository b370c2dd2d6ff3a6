"""Export of students to the formats of other libraries.

A recipe covers one library and one family of backbones. Its Python code is written to the README of the export. Before
an export is published, the same code is run in a separate process and its outputs are compared with the student, so
that the code which a reader copies has been tested.
"""

from spar_lightning.export.exporter import LIBRARIES as LIBRARIES
from spar_lightning.export.exporter import export as export
from spar_lightning.export.parity import ExportError as ExportError
