# The commands of a clone; `make` alone lists them. Works with GNU make 3.81 (macOS) and any sh.
#
# Words with a lower-case name, like learning_rate=0.01, are settings and go on to the program;
# upper-case ones (ID, NAME, ARGS, PYTHON) are read here.

.DEFAULT_GOAL := help
COMMANDS := help setup demo example server worker watch runs keys up doctor plan status logs attach fetch down test test-long check bench profile simulate chaos soak fuzz format docs constraints clean
.PHONY: $(COMMANDS)

VENV_PYTHON := .venv/bin/python
READY := .venv/.ready
LIGHT := .venv/.light

unexport ARGS DRY HOST HOSTS ID JOIN MINUTES NAME ONLY QUICK ROTATE ROUNDS SCRIPT SEED SEEDS # they are for this make, not for one that a test or a program starts

# Nothing that is typed is ignored: words without a = are commands, and these take no settings.

ifeq ($(MAKELEVEL),0)
TAKES_NOTHING := help setup check format docs constraints clean
UNKNOWN := $(patsubst %:,%,$(filter-out $(COMMANDS) $(READY),$(MAKECMDGOALS)))
ifneq ($(UNKNOWN),)
QUOTED := A setting with braces and spaces is written in quotes: 'optimizer={name: AdamW}'
WITH_SIGN := A setting is written with a =: $(firstword $(UNKNOWN))=$(or $(word 2,$(UNKNOWN)),VALUE)
$(error $(firstword $(UNKNOWN)) is no command; make alone lists them$(if $(word 2,$(MAKECMDGOALS)),. \
    $(if $(findstring },$(UNKNOWN))$(findstring ],$(UNKNOWN)),$(QUOTED),$(WITH_SIGN))))
endif
ifeq ($(filter-out $(TAKES_NOTHING),$(or $(MAKECMDGOALS),help)),)
ifneq ($(filter-out PYTHON=% TORCH=%,$(MAKEOVERRIDES)),)
$(error $(or $(MAKECMDGOALS),help) takes no settings: $(filter-out PYTHON=% TORCH=%,$(MAKEOVERRIDES)))
endif
endif
endif

# What somebody typed, not what the environment happens to hold.
typed = $(if $(findstring command,$(origin $1)),$($1))
ifneq ($(filter-out cpu cuda,$(call typed,TORCH)),)
$(error TORCH=$(TORCH): it is cpu or cuda)
endif


help: ## list these commands
	@trap '' PIPE; { \
	    sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | \
	        awk -F '|' '{ printf "%-20s %s\n", $$1, $$2 }'; \
	    printf '\nSettings follow as words: make demo num_epochs=5 model.hidden=256\n'; \
	    printf 'All of them, with meaning, default and unit: make server ARGS=--help\n'; \
	} 2> /dev/null || : # also into `| head`

setup: $(READY) ## make .venv with all that is needed (PYTHON=python3.12; TORCH=cpu or cuda)
	@test -z '$(call typed,TORCH)' || ! test -t 1 || $(VENV_PYTHON) -c 'from importlib.metadata import version; \
	    print("PyTorch", version("torch"), "is here; for another build remove it first: make clean")'

demo: $(READY) ## train on real digits: a server and two workers, all on this machine
	@$(RUN) paramserver.launch demo $(ARGS)

example: $(READY) ## train one of examples/ on this machine: make example NAME=digits
	@$(RUN) paramserver.launch script examples/$(or $(call typed,NAME),digits).py $(ARGS)

server: $(READY) ## start a server and its observer
	@$(RUN) paramserver $(ARGS)

worker: $(READY) ## start a worker: make worker ID=2; elsewhere with JOIN= as the server prints it
	@$(RUN) workers $(if $(call typed,ID),id=$(ID)) $(ARGS)

watch: $(READY) ## watch a run, here or, with JOIN= as make keys prints it, on another machine
	@$(RUN) paramserver.watch $(ARGS)

runs: $(READY) ## a table of the runs in run_dir: when, model, steps, accuracy, speed, how it ended
	@$(RUN) paramserver.runs $(ARGS)

keys: $(READY) ## print the join token of a server at host_ip (ROTATE=1: new keys before)
	@$(RUN) paramserver.keys $(if $(call typed,ROTATE),rotate) $(ARGS)

up: $(LIGHT) ## start a run on the machines in conf/cluster.yaml, or HOSTS=mini1,mini2 (DRY=1: print)
	@$(RUN) paramserver.launch up $(if $(call typed,DRY),--dry) $(HOSTS_WORD) $(SCRIPT_WORDS)

doctor: $(LIGHT) ## look at each machine and measure every path; without machines, try this one's devices
	@$(RUN) paramserver.launch doctor $(HOSTS_WORD) $(ARGS)

plan: $(READY) ## predict the speed with each set of machines, codec and local_steps (ARGS=--json)
	@$(RUN) paramserver.launch plan $(HOSTS_WORD) $(ARGS)

status: $(LIGHT) ## how it stands on each machine
	@$(RUN) paramserver.launch status $(HOSTS_WORD) $(ARGS)

logs: $(LIGHT) ## what each machine said last (HOST=mini2: that one only)
	@$(RUN) paramserver.launch logs $(HOST_OPTION) $(HOSTS_WORD) $(ARGS)

attach: $(LIGHT) ## watch the run again (HOST=mini2: the lines of that machine)
	@$(RUN) paramserver.launch attach $(HOST_OPTION) $(HOSTS_WORD) $(ARGS)

fetch: $(LIGHT) ## copy the run's summary, curves, model and last checkpoint here, into runs/
	@$(RUN) paramserver.launch fetch $(HOSTS_WORD) $(ARGS)

down: $(LIGHT) ## end the run, in order, on every machine
	@$(RUN) paramserver.launch down $(HOSTS_WORD) $(ARGS)

test: $(READY) ## run the tests (ARGS='-k wire -x' goes on to pytest)
	@$(RUN) pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder -m 'not long' $(ARGS)

test-long: $(READY) ## run those of large matrices: thousands of simulated runs, planted mistakes, chaos
	@$(RUN) pytest --numprocesses=auto --dist=load -m long $(ARGS)

check: $(READY) ## formatting, lint and types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

bench: $(READY) ## measure beside DDP with gloo (QUICK=1: under 3 minutes; ARGS='--only links')
	@$(RUN) benchmarks.bench $(if $(call typed,QUICK),--quick) $(ARGS)

profile: $(READY) ## where a step's time goes: a table, and trace.json in the run folder
	@$(RUN) paramserver.launch profile $(ARGS)

simulate: $(READY) ## whole runs with faults in virtual time (SEEDS=100000 ONLY=late+small ARGS=--shards)
	@$(RUN) tests.simulation $(if $(call typed,SEEDS),--seeds $(SEEDS)) $(if $(call typed,ONLY),--only $(ONLY)) $(ARGS)

chaos: $(READY) ## a training whose processes are killed, stopped and started again (MINUTES=2 SEED=7)
	@PYTHONPATH=tests $(RUN) chaos $(if $(call typed,MINUTES),--minutes $(MINUTES)) $(if $(call typed,SEED),--seed $(SEED)) $(ARGS)

soak: $(READY) ## workers come and go for many rounds: memory and descriptors stay flat (ROUNDS=100000)
	@PYTHONPATH=tests $(RUN) chaos --soak $(or $(call typed,ROUNDS),100000) $(if $(call typed,SEED),--seed $(SEED)) $(ARGS)

fuzz: $(READY) ## made-up bytes for all that reads from sockets and files (MINUTES=10; ARGS='--only token')
	@PYTHONPATH=tests $(RUN) fuzz $(if $(call typed,MINUTES),--minutes $(MINUTES)) $(ARGS)

format: $(READY) ## bring all files into shape
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

docs: $(READY) ## write the generated tables and diagrams: settings, states, torch's arguments
	@$(VENV_PYTHON) -m paramserver.config.page
	@$(VENV_PYTHON) -m workers.builtin.reading
	@exec $(VENV_PYTHON) -m paramserver.rounds.diagrams

constraints: $(READY) ## pin the newest version of everything in constraints.txt
	@echo '# What every installation gets; written by: make constraints' > .venv/constraints.txt
	.venv/bin/uv pip compile --quiet --universal --upgrade --all-extras --fork-strategy fewest \
	    --no-emit-index-url --no-annotate --no-header pyproject.toml >> .venv/constraints.txt
	@! grep -n '^[^#].*[/@]' .venv/constraints.txt || { echo 'an address or a path is no pin' >&2; exit 1; }
	mv .venv/constraints.txt constraints.txt

clean: ## remove .venv, caches and built packages; runs/ and data/ stay
	rm -rf .venv .setup.lock build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +


HOST_OPTION = $(if $(call typed,HOST),--host=$(HOST))
HOSTS_WORD = $(if $(call typed,HOSTS),hosts=$(HOSTS))
SCRIPT_WORDS = $(if $(call typed,SCRIPT),--script='$(SCRIPT)' -- )$(ARGS)


# JOIN is a secret, so it goes on in the environment and not on the program's command line. make's own
# is in the list of processes all the same; JOIN=FILE, or JOIN=... before the word make, is not.

ifdef JOIN
export PARAMSERVER_JOIN := $(JOIN)
endif


# How settings go on: make keeps its command line in MAKEOVERRIDES, newest word first, with a `\`
# before blanks and backslashes, and `$` doubled. PASS_ON undoes that, shows the command, and becomes
# the program, which so gets the terminal and the signals itself. An upper-case word that this command
# does not read goes on too, for the program to name what was meant; not where an outer make had it.

define PASS_ON
import os, re, shlex, signal, sys
goal, *arguments = sys.argv[1:]
makefile = open("Makefile").read()
recipe = makefile.partition(f"\n{goal}:")[2].partition("\n\n")[0]
read, known = [{"ARGS", "PYTHON", "TORCH", *re.findall("[A-Z]+", text)} for text in (recipe, makefile)]
inner = os.environ.get("MAKELEVEL", "1") != "1"
words = shlex.shlex(os.environ.pop("OVERRIDES"), posix=True)
words.whitespace, words.quotes, words.commenters, words.whitespace_split = " ", "", "", True
settings, given = [], {}
for word in words:
    name, _, value = re.split("([:+?]*=)", word, maxsplit=1)
    if name in ("HOST", "HOSTS", "ID", "JOIN", "SCRIPT") and not value and not inner:
        sys.exit(f"error: {name}= has no value\n  give one, or leave it out")
    if name == "JOIN":
        given["join"] = value
    if name in read or name.isupper() and inner:
        continue
    if name in known and name.isupper():
        near = [each for each in read if each.startswith(name[:3])]
        hint = f": {near[0]}= is what it reads" if near else ""
        sys.exit(f"error: make {goal} does not read {name}={hint}")
    settings.append(word.replace("$$$$", "$$"))
behind = []
ours = re.match("paramserver|workers", arguments[0])
if "--" in arguments: # what follows is for the user's script
    at = arguments.index("--")
    arguments, behind = arguments[:at], arguments[at:]
for word in [*arguments, *settings] if ours else (): # here ID=2 is id=2, and ARGS may have held anything
    name, is_given, value = word.partition("=")
    if is_given and given.setdefault(name, value) != value:
        two = "" if name == "join" else f": {given[name]} and {value}" # a token is a secret
        sys.exit(f"error: make {goal} has two values for {name}{two}\n  leave one of them out")
command = ["$(VENV_PYTHON)", "-m", *arguments, *reversed(settings), *behind]
try:
    print(shlex.join(command), file=sys.stderr if "--json" in arguments else None, flush=True)
except OSError: # a full disk, a pipe whose reader has ended
    pass
del os.environ["PASS_ON"], os.environ["SET_UP"]
if ours: # Ctrl-C waits for what ends it without a traceback
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
os.execv(command[0], command)
endef
export PASS_ON
export OVERRIDES = $(MAKEOVERRIDES)
RUN = exec $(VENV_PYTHON) -S -c "$$PASS_ON" $@


# How .venv is made: with a Python that fits, then by uv, from the PATH or put into .venv. A try that
# was cut off leaves .venv/.unfinished, and the next one starts afresh. What only looks at other machines
# needs neither PyTorch nor the rest that is large: .venv/.light stands for an environment without.

$(READY): pyproject.toml constraints.txt
	@WANTED=all sh -euc "$$SET_UP"

$(LIGHT): pyproject.toml constraints.txt
	@WANTED=light sh -euc "$$SET_UP"

NEEDED_TO_LOOK := filelock msgspec omegaconf psutil pyyaml pyzmq rich zeroconf

define SET_UP
fits() { "$$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'; }
version() { "$$1" -c 'import platform; print(platform.python_version())' || echo 'not a Python'; }
have() { "$$@" > /dev/null 2>&1; }
fail() { printf '%s\n' "$$@" >&2; exit 1; }

test -w . || fail "cannot write to $$PWD"

# Three terminals may all start here on a fresh clone: the others wait for the first.
until ln -s $$$$ .setup.lock 2> /dev/null; do
    owner=$$(readlink .setup.lock) || continue
    have kill -0 "$$owner" || { rm -f .setup.lock; continue; }
    test -n "$${said:-}" || echo "waiting for another set-up (process $$owner)"
    said=yes
    sleep 1
done
trap 'rm -f .setup.lock' EXIT
trap 'exit 130' HUP INT TERM
fresh() { test "$$1" -nt pyproject.toml && test "$$1" -nt constraints.txt; }
if fresh $(READY); then touch $(LIGHT); exit 0; fi
if test "$$WANTED" = light && fresh $(LIGHT); then exit 0; fi

# Which PyTorch: the one for CUDA takes 4 GB more, for nothing where there is no NVIDIA GPU.
nvidia() { have nvidia-smi -L || test -e /dev/nvidia0 || test -e /proc/driver/nvidia/version; }
torch='$(call typed,TORCH)'
case $$torch in
    cpu | cuda) ;;
    '') if nvidia; then torch=cuda; else torch=cpu; fi ;;
esac

if test -e .venv/.unfinished || ! have fits $(VENV_PYTHON); then
    if test -n "$${PYTHON:-}"; then set -- "$$PYTHON"; else set -- python3 python3.13 python3.12 python3.11; fi
    python= found=
    for name; do
        if have fits "$$name"; then python=$$name; break; fi
        if have command -v "$$name"; then found="$$found $$name ($$(version "$$name" 2> /dev/null))"; fi
    done
    rm -rf .venv
    mkdir .venv
    touch .venv/.unfinished
    if test -n "$$python"; then
        echo "making .venv with $$python ($$(version "$$python")); this may take some minutes the first time"
        if have "$$python" -c 'import ensurepip'; then
            "$$python" -m venv .venv
        else # Debian's python3 without python3-venv
            "$$python" -m venv --without-pip .venv
        fi
    else
        test -z "$${PYTHON:-}" && have uv --version && echo 'no fitting Python here: uv fetches one' &&
            uv venv --allow-existing --python '>=3.11,<3.14' .venv ||
            fail "Python 3.11, 3.12 or 3.13 is needed; found:$${found:- none}" \
                '  install one and try again, or name it: make setup PYTHON=/path/to/python3.12'
    fi
fi
touch .venv/.unfinished

uv=uv
if ! have uv --version; then
    uv=.venv/bin/uv
    if have $(VENV_PYTHON) -m pip --version; then
        set -- $(VENV_PYTHON) -m pip
    elif have "$${python:=python3}" -m pip --version; then
        set -- "$$python" -m pip --python $(VENV_PYTHON)
    else
        fail "neither pip nor uv is here to install packages with" \
            "  install one (Debian: apt install python3-venv) and try again"
    fi
    "$$@" install --quiet --disable-pip-version-check --constraint constraints.txt uv
fi
pins=constraints.txt
binary=
install() {
    "$$uv" pip install --python $(VENV_PYTHON) --build-constraint constraints.txt --constraint "$$pins" \
        $$binary "$$@"
}
if test "$$WANTED" = light; then
    install $(NEEDED_TO_LOOK)
    install --no-deps --editable .
    rm .venv/.unfinished
    touch $(LIGHT)
    exit 0
fi
if test "$$(uname -s)" = Darwin; then
    torch=usual
    test "$$($(VENV_PYTHON) -c 'import platform; print(platform.machine())')" = arm64 ||
        fail 'PyTorch 2.2 was the last one for Intel processors of Macs; 2.6 or newer is needed' \
            '  on Apple silicon choose an arm64 Python: make setup PYTHON=/path/to/python3.12'
    mac=$$(sw_vers -productVersion | cut -d . -f 1)
    test "$$mac" -ge 12 || fail "macOS 12 or newer is needed, this is $$mac"
    if test "$$mac" -lt 14; then
        echo "the newest PyTorch needs macOS 14, this is $$mac: installing an older one"
        pins=.venv/constraints.txt
        grep -v '^torch\|^wandb\|^setuptools' constraints.txt > "$$pins"
        binary='--only-binary torch --only-binary torchvision --only-binary wandb'
    fi
elif ! have $(VENV_PYTHON) -c 'import importlib.metadata as m; m.version("torch")'; then
    if test "$$torch" = cpu; then
        echo 'installing PyTorch for the CPU, up to 2 GB in .venv (TORCH=cuda: for NVIDIA GPUs, 6 GB)'
        # Asked without installing first: of an index that cannot be reached the usual build is the
        # answer, and what uv says of it is shown only where that one fails, too.
        if ! install --dry-run --torch-backend cpu torch torchvision > .venv/.said 2>&1; then
            echo 'its index, download.pytorch.org, cannot be used; the usual build runs on the CPU, too'
            torch=cuda
        else
            rm .venv/.said
            install --torch-backend cpu torch torchvision || {
                echo 'that failed; the usual build runs on the CPU, too'
                torch=cuda
            }
        fi
    fi
    if test "$$torch" = cuda; then
        echo 'installing PyTorch with CUDA, 6 GB in .venv'
        room=$$(df -Pk .venv | awk 'NR == 2 { print $$4 }')
        test "$$room" -ge 6500000 ||
            fail "only $$((room / 1000000)) GB are free in $$PWD" '  make room, and try again'
    fi
fi
install --editable '.[dev]' || {
    test ! -e .venv/.said || { echo 'and before, of the build for the CPU:'; cat .venv/.said; } >&2
    exit 1
}
rm -f .venv/.said
# To byte code goes what our programs import, not all that is installed; also where the environment
# says that Python writes none, or each start would take the time.
export PYTHONDONTWRITEBYTECODE=
have $(VENV_PYTHON) -c 'import paramserver.server.program, workers.builtin.train, workers.observer.observer' ||
    echo 'PyTorch does not load here: $(VENV_PYTHON) -c "import torch" says why'
rm .venv/.unfinished
touch $(READY) $(LIGHT)
endef
export SET_UP
