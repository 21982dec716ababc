"""What a student becomes: a diffusers folder, a single file, and what each says of itself."""

from reflow.export.folder import Export, export_folder
from reflow.export.single_file import export_single_file, single_file_state
from reflow.export.stock import stock_scheduler

__all__ = ["Export", "export_folder", "export_single_file", "single_file_state", "stock_scheduler"]
