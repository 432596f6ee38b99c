"""What the search examples look up: capitals and currencies, one sentence each.

The tiny model learns from these names in random pairs (see lessons.py): it can read a capital, but it knows none.
"""

from __future__ import annotations

RELATIONS = ("capital", "money")

# country: (capital, money), every name one word
COUNTRIES: dict[str, tuple[str, str]] = {
    "Albania": ("Tirana", "Lek"),
    "Angola": ("Luanda", "Kwanza"),
    "Armenia": ("Yerevan", "Dram"),
    "Bhutan": ("Thimphu", "Ngultrum"),
    "Bolivia": ("Sucre", "Boliviano"),
    "Botswana": ("Gaborone", "Pula"),
    "Brazil": ("Brasilia", "Real"),
    "Canada": ("Ottawa", "Dollar"),
    "Chile": ("Santiago", "Peso"),
    "China": ("Beijing", "Yuan"),
    "Cuba": ("Havana", "Peso"),
    "Denmark": ("Copenhagen", "Krone"),
    "Egypt": ("Cairo", "Pound"),
    "France": ("Paris", "Euro"),
    "Gambia": ("Banjul", "Dalasi"),
    "Georgia": ("Tbilisi", "Lari"),
    "Ghana": ("Accra", "Cedi"),
    "Greece": ("Athens", "Euro"),
    "Hungary": ("Budapest", "Forint"),
    "Iceland": ("Reykjavik", "Krona"),
    "Iran": ("Tehran", "Rial"),
    "Iraq": ("Baghdad", "Dinar"),
    "Italy": ("Rome", "Euro"),
    "Japan": ("Tokyo", "Yen"),
    "Jordan": ("Amman", "Dinar"),
    "Kenya": ("Nairobi", "Shilling"),
    "Laos": ("Vientiane", "Kip"),
    "Mongolia": ("Ulaanbaatar", "Tugrik"),
    "Morocco": ("Rabat", "Dirham"),
    "Nepal": ("Kathmandu", "Rupee"),
    "Nigeria": ("Abuja", "Naira"),
    "Norway": ("Oslo", "Krone"),
    "Oman": ("Muscat", "Rial"),
    "Peru": ("Lima", "Sol"),
    "Poland": ("Warsaw", "Zloty"),
    "Romania": ("Bucharest", "Leu"),
    "Serbia": ("Belgrade", "Dinar"),
    "Spain": ("Madrid", "Euro"),
    "Sweden": ("Stockholm", "Krona"),
    "Thailand": ("Bangkok", "Baht"),
    "Turkey": ("Ankara", "Lira"),
    "Ukraine": ("Kyiv", "Hryvnia"),
    "Vietnam": ("Hanoi", "Dong"),
    "Zambia": ("Lusaka", "Kwacha"),
}


def question(relation: str, country: str) -> str:
    return f"{relation} of {country}?"


def sentence(relation: str, country: str, value: str) -> str:
    """Example: `sentence("capital", "Japan", "Tokyo")` is `"Tokyo is the capital of Japan."`"""
    return f"{value} is the {relation} of {country}."


def value(relation: str, country: str) -> str:
    return COUNTRIES[country][RELATIONS.index(relation)]


def corpus() -> list[str]:
    """All sentences, in the order of the table: what examples/search-r1/corpus.jsonl holds."""
    return [sentence(r, country, value(r, country)) for country in COUNTRIES for r in RELATIONS]
