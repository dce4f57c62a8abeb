"""Translation of an exported graph into a description."""

from intrafusion.models.exported_program.importer.translation import lifted as lifted

__all__ = ["lifted"]
