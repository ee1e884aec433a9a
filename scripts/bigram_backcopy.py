"""The Bigram-Backcopy task at a reduced size, for the table in mechlens/methods/sinks/README.md: python
scripts/bigram_backcopy.py [STEPS]

The authors' smallest model that has all three phenomena (three blocks of which the middle one has a head), with 32
dimensions instead of 256, sequences of 32 letters instead of 256, batches of 32 instead of 512.
"""

import sys

import mechlens as ml

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
LOOKS = (0, 500, 2000, 6000)
RUNS = (
    ("softmax, Adam", ml.BackcopyShape(layers=3, width=32, length=32, headless=(0, 2)), "adam", 3e-3),
    ("ReLU, Adam", ml.BackcopyShape(layers=3, attention="relu", width=32, length=32, headless=(0, 2)), "adam", 3e-3),
    ("gated, Adam", ml.BackcopyShape(layers=3, attention="gated", width=32, length=32, headless=(0, 2)), "adam", 3e-3),
    ("softmax, SGD", ml.BackcopyShape(layers=3, width=32, length=32, headless=(0, 2)), "sgd", 0.3),
)


def main() -> None:
    task = ml.backcopy_task()
    print("| attention, optimiser | steps | loss after triggers | loss elsewhere, above the entropy "
          "| mass on the start | value norm there | largest peak |")  # fmt: skip
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, shape, optimiser, rate in RUNS:
        training = ml.BackcopyTraining(steps=STEPS, optimiser=optimiser, learning_rate=rate)
        run = ml.train_backcopy(task, shape, training)
        for step in (look for look in LOOKS if look <= STEPS):
            (loss,), (head,) = (table[table["step"] == step].to_dict("records") for table in (run.losses, run.heads))
            peak = run.levels[run.levels["step"] == step]["peak"].max()
            print(f"| {name} | {step} | {loss['copy']:.3f} | {loss['rest'] - loss['entropy']:.3f} | {head['mass']:.2f} "
                  f"| {head['value']:.2f} | {peak:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
