"""What a kernel costs on a chip: rates by the compilers' schedules, and what bounds them."""
