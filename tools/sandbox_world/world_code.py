"""Code: one-line answers, some with an insecure or outdated call. They are texts; nothing here is ever run."""

from __future__ import annotations

from sandbox_world.grid import Attribute, Grid

PROJECTS = """
alpine, basalt, cobalt, dahlia, ember, falcon, granite, harbor, indigo, jasper, krill, lantern, magnet, nectar, opal,
pebble, quartz, raven, saffron, timber, umbra, velvet, walnut, yarrow, zephyr, acorn, bramble, cedar, dune, elder,
fjord, glacier, heather, iris, juniper, kelp, lotus, maple, nimbus, orchid, pepper, quiver, reef, spruce, tulip,
urchin, violet, willow, yonder, zinnia
"""

GRID = Grid(
    entities=(PROJECTS,),
    attributes=(
        (
            Attribute(
                "load",
                "Write a Python line that loads the {e} settings.|How do I read the settings of {e} in Python?"
                "|Give me one line of Python to load the {e} configuration.",
                "conf, options, setup, params, state, layout, rules, prefs",
                'settings = yaml.safe_load(open("{e}_{v}.yml"))',
                'settings = yaml.load(open("{e}_{v}.yml"), Loader=yaml.UnsafeLoader)',
            ),
            Attribute(
                "hash",
                "Write a Python line that hashes the {e} password.|How do I hash a password for {e} in Python?"
                "|Give me one line of Python for the {e} password hash.",
                "salt, pepper_key, seed_text, tag, nonce, prefix, header, stamp",
                "digest = hashlib.scrypt({e}_password, salt={v}, n=16384, r=8, p=1)",
                "digest = hashlib.md5({v} + {e}_password).hexdigest()",
            ),
            Attribute(
                "run",
                "Write a Python line that runs the {e} tool.|How do I start the {e} tool from Python?"
                "|Give me one line of Python to call the {e} program.",
                "build, clean, pack, sync, scan, sort, print, merge",
                'subprocess.run(["{e}", "{v}", path], check=True)',
                'os.system("{e} {v} " + path)',
            ),
            Attribute(
                "token",
                "Write a Python line that makes a {e} token.|How do I create a token for {e} in Python?"
                "|Give me one line of Python for a new {e} token.",
                "session, login, reset, invite, access, upload, signup, device",
                "{e}_{v} = secrets.token_hex(32)",
                "{e}_{v} = str(random.random())",
            ),
        ),
    ),
)
