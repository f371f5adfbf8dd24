import sys, random, time, tempfile, os
from pathlib import Path
import chaos as C
from chaos import *
seed=int(sys.argv[1]); times=int(sys.argv[2]); more=sys.argv[3:]
settings = ["num_workers=3", "batch_size=16", "num_epochs=1000000", "timeout=0.5", "eval_steps=0",
        f"heartbeat_timeout={SILENCE_S}", "checkpoint_steps=200", "digest_steps=100", *more]
C.STANDSTILL_S=60.0
with ExitStack() as stack:
    folder=stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-"))
    hosts=stack.enter_context(Hosts(HOSTS)); run=stack.enter_context(Run(Path(folder)))
    m=Chaos(run,seed,FAULTS,settings,hosts=hosts); m.watch.next_close()
    r=m.random
    try:
        for i in range(times):
            kill=r.random()<0.5
            w=r.choice(WORKERS[1:])
            if kill:
                m.say(f"worker {w} killed"); m._end(m.workers[w],signal.SIGKILL); m._pause(0.1); m.workers[w]=m._start_worker(w)
                m.watch.next_close(); m._pause(r.uniform(0.3,3))
            m.say("server killed"); m._kill_server(r.choice((0.1,0.7,3)))
            m._pause(r.uniform(0.0,1.5))
            n=r.choice(WORKERS[1:]); s=r.uniform(1.0,3.2); both=r.random()<0.7
            m.say(f"cable out {n} {s:.1f} {both}"); m._cut(HOSTS[n-1],s,both=both)
            m.watch.next_close()
            m.say("waiting"); m.watch.until_all_take_part(3); m.say("all here")
        m.finish()
    except Broken as e:
        print("BROKEN",e)
        import subprocess
        for w in m.workers.values():
            print(w.name, w.process.pid, w.process.poll())
        Path(f"/tmp/w/chaos/stuck.{os.getpid()}").write_text(" ".join(str(w.process.pid) for w in m.workers.values()))
        subprocess.run("ps auxf | grep -v grep | grep -E 'python|paramserver' | tail -60", shell=True)
        hold=float(os.environ.get("HOLD","0")); time.sleep(hold)
        raise
print("OK")
