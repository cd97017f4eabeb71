"""Fine-tune a pretrained model under differential privacy: `python -m privzoo.train task=… method=… eps=…`."""

from omegaconf import DictConfig

from privzoo.cli import run_hydra
from privzoo.launch import fine_tune
from privzoo.run_folder import open_folder


def train(cfg: DictConfig) -> None:
    """One run, or the result of the finished one that has this configuration."""
    folder = open_folder(cfg)
    if folder.is_done:
        folder.key.unlink(missing_ok=True)  # left over if the process was killed at its very last step
        print(f"privzoo: {folder.path} is finished already; another seed= or output_dir= makes another run.")
        record = folder.record
    else:
        record = fine_tune(folder)
    from privzoo.reporting.display import final_table, print_table

    assert record is not None
    print_table(final_table(record, folder.path))


def main() -> None:
    """Entry point of `privzoo-train`."""
    run_hydra(train, "train")


if __name__ == "__main__":
    main()
