"""The look that the HTML pages share: template, style, theme switch, and charts drawn without scripts."""
