"""The six ten-class subsets of ImageNet that the literature distils at 128 pixels. Torch-free.

Classes and their order are those of MTT (Cazenavette et al., Dataset Distillation by Matching Training Trajectories, 2022).
"""

from __future__ import annotations

SUBSETS: dict[str, dict[str, str]] = {
    "imagenette": {
        "n01440764": "tench",
        "n02102040": "english-springer",
        "n02979186": "cassette-player",
        "n03000684": "chain-saw",
        "n03028079": "church",
        "n03394916": "french-horn",
        "n03417042": "garbage-truck",
        "n03425413": "gas-pump",
        "n03445777": "golf-ball",
        "n03888257": "parachute",
    },
    "imagewoof": {
        "n02096294": "australian-terrier",
        "n02093754": "border-terrier",
        "n02111889": "samoyed",
        "n02088364": "beagle",
        "n02086240": "shih-tzu",
        "n02089973": "english-foxhound",
        "n02087394": "rhodesian-ridgeback",
        "n02115641": "dingo",
        "n02099601": "golden-retriever",
        "n02105641": "old-english-sheepdog",
    },
    "imagefruit": {
        "n07753275": "pineapple",
        "n07753592": "banana",
        "n07745940": "strawberry",
        "n07747607": "orange",
        "n07749582": "lemon",
        "n07768694": "pomegranate",
        "n07753113": "fig",
        "n07720875": "bell-pepper",
        "n07718472": "cucumber",
        "n07742313": "granny-smith",
    },
    "imagemeow": {
        "n02123045": "tabby",
        "n02123159": "tiger-cat",
        "n02123394": "persian-cat",
        "n02123597": "siamese-cat",
        "n02124075": "egyptian-cat",
        "n02129165": "lion",
        "n02129604": "tiger",
        "n02128925": "jaguar",
        "n02128757": "snow-leopard",
        "n02127052": "lynx",
    },
    "imagesquawk": {
        "n01806143": "peacock",
        "n02007558": "flamingo",
        "n01818515": "macaw",
        "n02051845": "pelican",
        "n02056570": "king-penguin",
        "n01614925": "bald-eagle",
        "n01843383": "toucan",
        "n01518878": "ostrich",
        "n01860187": "black-swan",
        "n01819313": "cockatoo",
    },
    "imageyellow": {
        "n02206856": "bee",
        "n12057211": "ladys-slipper",
        "n07753592": "banana",
        "n07749582": "lemon",
        "n12144580": "corn",
        "n04146614": "school-bus",
        "n03530642": "honeycomb",
        "n02129165": "lion",
        "n01773157": "garden-spider",
        "n01531178": "goldfinch",
    },
}
"""Name of the subset to its classes: WordNet id to name, in the order of the labels."""
