"""The escape suite: everything an attacker inside a compartment may try, and that none of it gets through.

An attempt is one function in a table. It is run twice. Outside, in a plain forked child with no compart anywhere, it must
get through: only then does it say anything that it fails inside. Inside, in a compartment, it must be refused for the
stated reason: with the expected errno, with a recorded violation that names the call, and without the effect, which the
host looks for itself.

To add one, write it into the file of its surface (files, processes, network, ...):

    @attempt(surface="files", refused_with=PermissionError, call="openat")
    def opens_a_file_nobody_granted(outside):
        with open(outside.secret, "rb") as file:
            return file.read()

`outside` is the `World` that the host laid out; the name of the function says what is tried. Proof of getting through is,
in this order of preference:

- `effect=`: a function of the world, asked in the host after each run. True outside, False inside.
- `proof=`: a function of the world and of what the attempt returned.
- neither: the attempt returned the secret's bytes, `outside.token`.

`arrange=` lays out more of the world, `gives=` makes what is handed over (the attempt gets it as further arguments),
`policy=` are fields of the policy, `privileged=True` says that outside it takes root. `raw("mount", arguments)` enters one
system call made by machine code of our own (native.py), which is how real attackers come: no libc, no Python.

`refused_with=` is an exception type, an errno, `dies_by(signal)`, or CONTAINED for what meets no error inside but reaches
nothing; or several of them. PermissionError means EPERM, compart's own answer, and nothing else. `call=` names the call in the
violation; leave it out where none is made.

What would hurt the machine if it got through is called with arguments that the kernel refuses by another errno:
`outside=reaches(errno.EINVAL)`. What this kernel cannot do at all is `outside=Unavailable(reason, probe)`, where the probe shows
it; those are listed in test_attempts.py.

`needs={"namespaces"}` names the walls without which the grant cannot be bounded; on a machine that lacks one, compart must
refuse to run it (UnsupportedError). test_under.py plays such machines and runs `python -m tests.escape` on each.

Lies on the channel and values that attack their receiver are in test_wire.py and test_results.py.
"""
