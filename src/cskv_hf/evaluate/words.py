"""Words that ids are made of, an adjective and a noun: "golden-harbor"."""

_ADJECTIVES = """
able amber ancient bitter blue bold brave brief bright broad calm careful cheap clean clear clever cold cool
crisp curious damp dark deep dense distant double dry eager early easy empty exact fair false famous fast
fierce final firm flat formal free fresh full gentle glad golden grand gray great green happy hard heavy
hollow honest humble idle keen kind large late lean light little lively local lonely long loud lucky mellow
"""
_NOUNS = """
anchor apple arrow autumn badge basket beacon bell bird blanket boat bottle branch bridge brook button cabin
candle canyon carpet castle cedar chair circle cloud coast copper corner cotton cradle crown desert diamond
door drum eagle engine feather fence field finger flame flower forest fountain garden glass glove guitar
hammer harbor hill horse island jacket jewel kettle ladder lake lantern leaf lemon letter marble meadow mirror
mountain needle ocean orchard paper pebble pencil pepper
"""
ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())
