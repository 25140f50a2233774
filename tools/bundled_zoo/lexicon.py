"""The words of the bundled zoo, written by hand: one English word, one German word, and what grammar needs to know.

The tables are text, one word a line, so that a speaker of German can check and extend them. This module knows no
rule of grammar; `grammar` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, cast

Gender = Literal["m", "f", "n"]
Case = Literal["nom", "acc", "dat"]


@dataclass(frozen=True)
class Noun:
    """A noun in the singular; `oblique` is its accusative and dative (weak nouns: der Junge, den Jungen)."""

    english: str
    german: str
    gender: Gender
    kind: str
    oblique: str


@dataclass(frozen=True)
class Adjective:
    """An adjective; `stem` takes the endings -e, -er, -es, -en. `kinds` are the nouns it is said of."""

    english: str
    stem: str
    kinds: frozenset[str]


@dataclass(frozen=True)
class Verb:
    """A transitive verb, third person singular, with the case of its object and the nouns it goes with.

    `motion` verbs move their object and take phrases of direction; the others take phrases of place.
    """

    english: str
    german: str
    case: Case
    subjects: frozenset[str]
    objects: frozenset[str]
    motion: bool


@dataclass(frozen=True)
class Preposition:
    """A preposition in one meaning, the case it governs in that meaning, and the nouns it goes with.

    `role` is ``place`` (where), ``source`` (from where), ``goal`` (to where) or ``company`` (with whom, for
    whom).
    """

    english: str
    german: str
    case: Case
    role: str
    kinds: frozenset[str]


@dataclass(frozen=True)
class Determiner:
    """An article or what stands in its place.

    Adjectives take the weak endings after a `strong` one, which shows the gender itself. A higher `weight` makes it
    more frequent in the generated texts.
    """

    english: str
    german: str
    strong: bool
    weight: int


DETERMINERS = (
    Determiner("the", "der", True, 4),
    Determiner("a", "ein", False, 4),
    Determiner("this", "dies", True, 1),
    Determiner("every", "jed", True, 1),
    Determiner("my", "mein", False, 1),
    Determiner("our", "unser", False, 1),
)

# English | German | gender | accusative and dative where they differ from the nominative
_NOUNS = {
    "person": """
        man Mann m
        woman Frau f
        child Kind n
        boy Junge m Jungen
        girl Mädchen n
        baby Baby n
        teacher Lehrer m
        doctor Arzt m
        friend Freund m
        mother Mutter f
        father Vater m
        brother Bruder m
        sister Schwester f
        son Sohn m
        daughter Tochter f
        uncle Onkel m
        aunt Tante f
        grandmother Großmutter f
        grandfather Großvater m
        niece Nichte f
        nephew Neffe m Neffen
        wife Ehefrau f
        husband Ehemann m
        bride Braut f
        widow Witwe f
        lady Dame f
        gentleman Herr m Herrn
        neighbour Nachbar m Nachbarn
        student Student m Studenten
        pupil Schüler m
        king König m
        queen Königin f
        prince Prinz m Prinzen
        princess Prinzessin f
        president Präsident m Präsidenten
        goddess Göttin f
        actress Schauspielerin f
        waitress Kellnerin f
        nurse Krankenschwester f
        midwife Hebamme f
        secretary Sekretärin f
        heiress Erbin f
        farmer Bauer m Bauern
        baker Bäcker m
        butcher Metzger m
        cook Koch m
        gardener Gärtner m
        painter Maler m
        singer Sänger m
        dancer Tänzer m
        pilot Pilot m Piloten
        soldier Soldat m Soldaten
        judge Richter m
        lawyer Anwalt m
        driver Fahrer m
        hunter Jäger m
        thief Dieb m
        guest Gast m
        witness Zeuge m Zeugen
        customer Kunde m Kunden
        colleague Kollege m Kollegen
        boss Chef m
        hero Held m Helden
        dwarf Zwerg m
        giant Riese m Riesen
        witch Hexe f
        wizard Zauberer m
        ghost Geist m
        nun Nonne f
        monk Mönch m
        tourist Tourist m Touristen
        policeman Polizist m Polizisten
        poet Dichter m
        engineer Ingenieur m
        carpenter Tischler m
        tailor Schneider m
        blacksmith Schmied m
        captain Kapitän m
        sailor Matrose m Matrosen
        passenger Passagier m
    """,
    "animal": """
        dog Hund m
        cat Katze f
        horse Pferd n
        cow Kuh f
        pig Schwein n
        sheep Schaf n
        goat Ziege f
        hen Henne f
        rooster Hahn m
        duck Ente f
        goose Gans f
        bird Vogel m
        fish Fisch m
        mouse Maus f
        rat Ratte f
        rabbit Kaninchen n
        hare Hase m Hasen
        fox Fuchs m
        wolf Wolf m
        bear Bär m Bären
        lion Löwe m Löwen
        tiger Tiger m
        elephant Elefant m Elefanten
        monkey Affe m Affen
        snake Schlange f
        frog Frosch m
        spider Spinne f
        bee Biene f
        fly Fliege f
        ant Ameise f
        butterfly Schmetterling m
        donkey Esel m
        camel Kamel n
        stag Hirsch m
        eagle Adler m
        owl Eule f
        raven Rabe m Raben
        pigeon Taube f
        swan Schwan m
        turtle Schildkröte f
        hedgehog Igel m
        squirrel Eichhörnchen n
        calf Kalb n
        lamb Lamm n
        kitten Kätzchen n
        foal Fohlen n
        puppy Welpe m Welpen
        piglet Ferkel n
        chick Küken n
        crocodile Krokodil n
        whale Wal m
        dolphin Delfin m
        crab Krebs m
        giraffe Giraffe f
        zebra Zebra n
        beaver Biber m
        mole Maulwurf m
        dragon Drache m Drachen
        unicorn Einhorn n
    """,
    "thing": """
        book Buch n
        letter Brief m
        newspaper Zeitung f
        magazine Zeitschrift f
        novel Roman m
        dictionary Wörterbuch n
        notebook Heft n
        pencil Bleistift m
        cup Tasse f
        glass Glas n
        plate Teller m
        bottle Flasche f
        knife Messer n
        fork Gabel f
        spoon Löffel m
        pot Topf m
        pan Pfanne f
        key Schlüssel m
        bag Tasche f
        suitcase Koffer m
        umbrella Regenschirm m
        hat Hut m
        coat Mantel m
        shirt Hemd n
        dress Kleid n
        jacket Jacke f
        skirt Rock m
        shoe Schuh m
        sock Socke f
        glove Handschuh m
        scarf Schal m
        belt Gürtel m
        button Knopf m
        ring Ring m
        chain Kette f
        crown Krone f
        clock Uhr f
        lamp Lampe f
        mirror Spiegel m
        picture Bild n
        photo Foto n
        map Landkarte f
        ball Ball m
        doll Puppe f
        toy Spielzeug n
        balloon Luftballon m
        guitar Gitarre f
        violin Geige f
        drum Trommel f
        piano Klavier n
        flute Flöte f
        hammer Hammer m
        saw Säge f
        axe Axt f
        rope Seil n
        net Netz n
        ladder Leiter f
        basket Korb m
        box Kiste f
        bucket Eimer m
        barrel Fass n
        sack Sack m
        broom Besen m
        candle Kerze f
        flower Blume f
        rose Rose f
        stone Stein m
        stick Stock m
        flag Fahne f
        coin Münze f
        stamp Briefmarke f
        ticket Fahrkarte f
        passport Pass m
        wallet Geldbeutel m
        computer Computer m
        telephone Telefon n
        radio Radio n
        camera Kamera f
        telescope Fernrohr n
        bicycle Fahrrad n
        wheel Rad n
        blanket Decke f
        pillow Kissen n
        towel Handtuch n
        soap Seife f
        comb Kamm m
        brush Bürste f
        needle Nadel f
        sword Schwert n
        shield Schild m
        gift Geschenk n
        bell Glocke f
        vase Vase f
    """,
    "food": """
        apple Apfel m
        pear Birne f
        banana Banane f
        orange Orange f
        cherry Kirsche f
        strawberry Erdbeere f
        lemon Zitrone f
        plum Pflaume f
        peach Pfirsich m
        melon Melone f
        grape Traube f
        nut Nuss f
        potato Kartoffel f
        tomato Tomate f
        carrot Karotte f
        onion Zwiebel f
        cucumber Gurke f
        mushroom Pilz m
        egg Ei n
        sausage Wurst f
        steak Steak n
        soup Suppe f
        salad Salat m
        sandwich Sandwich n
        pizza Pizza f
        pancake Pfannkuchen m
        cake Kuchen m
        biscuit Keks m
        roll Brötchen n
        cheese Käse m
    """,
    "place": """
        house Haus n
        garden Garten m
        kitchen Küche f
        room Zimmer n
        bathroom Badezimmer n
        bedroom Schlafzimmer n
        corridor Flur m
        hall Saal m
        cellar Keller m
        garage Garage f
        courtyard Hof m
        school Schule f
        classroom Klassenzimmer n
        university Universität f
        library Bibliothek f
        laboratory Labor n
        church Kirche f
        monastery Kloster n
        temple Tempel m
        city Stadt f
        village Dorf n
        forest Wald m
        park Park m
        zoo Zoo m
        castle Schloss n
        palace Palast m
        tower Turm m
        prison Gefängnis n
        hotel Hotel n
        restaurant Restaurant n
        pub Kneipe f
        hospital Krankenhaus n
        pharmacy Apotheke f
        museum Museum n
        theatre Theater n
        cinema Kino n
        factory Fabrik f
        office Büro n
        shop Laden m
        bakery Bäckerei f
        stable Stall m
        barn Scheune f
        mill Mühle f
        hut Hütte f
        tent Zelt n
        cave Höhle f
        tunnel Tunnel m
        valley Tal n
        desert Wüste f
        swamp Sumpf m
        harbour Hafen m
        station Bahnhof m
        train Zug m
        bus Bus m
        car Auto n
        boat Boot n
        ship Schiff n
        aeroplane Flugzeug n
    """,
    "surface": """
        table Tisch m
        desk Schreibtisch m
        chair Stuhl m
        armchair Sessel m
        stool Hocker m
        sofa Sofa n
        bench Bank f
        bed Bett n
        mattress Matratze f
        carpet Teppich m
        shelf Regal n
        cupboard Schrank m
        wall Mauer f
        roof Dach n
        balcony Balkon m
        terrace Terrasse f
        bridge Brücke f
        stage Bühne f
        tree Baum m
        branch Ast m
        rock Felsen m
        hill Hügel m
        cart Karren m
        raft Floß n
    """,
}

_GROUPS = {
    "person": ("person",),
    "living": ("person", "animal"),
    "object": ("thing", "food", "place", "surface"),
    "goods": ("thing", "food"),
    "ware": ("thing", "food", "animal"),
    "owned": ("person", "animal", "thing"),
    "address": ("person", "place"),
    "spot": ("place", "surface"),
    "all": ("person", "animal", "thing", "food", "place", "surface"),
}

# English | German stem (what stands before the ending) | said of
_ADJECTIVES = """
    small klein all
    big groß all
    old alt all
    beautiful schön all
    ugly hässlich all
    strange seltsam all
    white weiß all
    black schwarz all
    brown braun all
    grey grau all
    dirty schmutzig all
    wet nass all
    famous berühmt all
    green grün object
    red rot object
    blue blau object
    yellow gelb object
    new neu object
    clean sauber object
    cheap billig object
    expensive teur object
    warm warm object
    cold kalt object
    dark dunkl object
    round rund object
    empty leer spot
    heavy schwer goods
    light leicht goods
    hungry hungrig living
    tired müd living
    young jung living
    friendly freundlich living
    clever klug living
    lazy faul living
    brave mutig living
    sad traurig living
    happy glücklich living
    sick krank living
    strong stark living
    weak schwach living
    shy schüchtern living
    wild wild animal
    loud laut living
    quiet leis living
    angry wütend living
    curious neugierig living
    thin dünn living
    slow langsam living
    cheeky frech living
    proud stolz living
    polite höflich person
    rich reich person
    poor arm person
    honest ehrlich person
"""

# English | German | case of the object | subject | object | "motion" if it moves its object
_VERBS = """
    sees sieht acc living all
    finds findet acc living all
    loves liebt acc living all
    watches beobachtet acc living all
    seeks sucht acc living all
    knows kennt acc person all
    hates hasst acc living all
    touches berührt acc living all
    forgets vergisst acc person all
    draws zeichnet acc person all
    paints malt acc person all
    photographs fotografiert acc person all
    describes beschreibt acc person all
    admires bewundert acc person all
    mentions erwähnt acc person all
    fears fürchtet acc living living
    hears hört acc living living
    meets trifft acc living living
    wakes weckt acc living living
    saves rettet acc living living
    disturbs stört acc living living
    protects beschützt acc living living
    misses vermisst acc living living
    kisses küsst acc person living
    calls ruft acc person living
    praises lobt acc person living
    greets begrüßt acc person living
    visits besucht acc person address
    feeds füttert acc person animal
    washes wäscht acc person owned
    buys kauft acc person ware
    sells verkauft acc person ware
    needs braucht acc person ware
    steals stiehlt acc person ware
    weighs wiegt acc person ware
    hides versteckt acc living goods
    loses verliert acc person thing
    repairs repariert acc person thing
    breaks zerbricht acc person thing
    cleans putzt acc person thing
    measures misst acc person thing
    eats isst acc person food
    cuts schneidet acc person food
    tastes probiert acc person food
    orders bestellt acc person food
    helps hilft dat living living
    follows folgt dat living living
    trusts vertraut dat living living
    obeys gehorcht dat living living
    resembles ähnelt dat living living
    escapes entkommt dat living living
    harms schadet dat living living
    thanks dankt dat person living
    answers antwortet dat person living
    believes glaubt dat person living
    forgives verzeiht dat person living
    serves dient dat person living
    congratulates gratuliert dat person person
    carries trägt acc person goods motion
    brings bringt acc person goods motion
    pushes schiebt acc person goods motion
    pulls zieht acc person goods motion
    throws wirft acc person goods motion
    rolls rollt acc person goods motion
    sends schickt acc person goods motion
"""

# English | German | case | role | nouns it goes with ("_" stands for a space)
_PREPOSITIONS = """
    in in dat place place
    on auf dat place surface
    under unter dat place surface
    behind hinter dat place spot
    in_front_of vor dat place spot
    beside neben dat place spot
    near bei dat place spot
    out_of aus dat source place
    from von dat source surface
    into in acc goal place
    onto auf acc goal surface
    through durch acc goal place
    to zu dat goal address
    with mit dat company owned
    without ohne acc company owned
    for für acc company living
"""


def _rows(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines() if line.strip()]


def _kinds(group: str) -> frozenset[str]:
    return frozenset(_GROUPS.get(group, (group,)))


@cache
def nouns() -> tuple[Noun, ...]:
    """Every noun, in the order of the tables."""
    found = []
    for kind, table in _NOUNS.items():
        for english, german, gender, *oblique in _rows(table):
            found.append(Noun(english, german, cast(Gender, gender), kind, oblique[0] if oblique else german))
    return tuple(found)


@cache
def adjectives() -> tuple[Adjective, ...]:
    """Every adjective, in the order of the table."""
    return tuple(Adjective(english, stem, _kinds(group)) for english, stem, group in _rows(_ADJECTIVES))


@cache
def verbs() -> tuple[Verb, ...]:
    """Every verb, in the order of the table."""
    return tuple(
        Verb(english, german, cast(Case, case), _kinds(subjects), _kinds(objects), bool(motion))
        for english, german, case, subjects, objects, *motion in _rows(_VERBS)
    )


@cache
def prepositions() -> tuple[Preposition, ...]:
    """Every preposition, in the order of the table."""
    return tuple(
        Preposition(english.replace("_", " "), german, cast(Case, case), role, _kinds(group))
        for english, german, case, role, group in _rows(_PREPOSITIONS)
    )
