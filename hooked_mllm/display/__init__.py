"""How values are shown as text: names of heads, tables, byte counts."""
