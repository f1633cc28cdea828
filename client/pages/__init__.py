"""HTML pages that need nothing but themselves: escaped markup, charts, style, suppression of small cells."""
