"""Fine-tune a pretrained model under differential privacy: `python -m privzoo.train task=… method=… eps=…`."""

from omegaconf import DictConfig

from privzoo.cli import is_a_rank, run_hydra
from privzoo.launch import as_a_rank, fine_tune
from privzoo.run_folder import open_folder


def train(cfg: DictConfig) -> None:
    """One run, or the result of the finished one that has this configuration."""
    folder = as_a_rank(cfg) if is_a_rank() else open_folder(cfg)
    record = fine_tune(folder)
    if record is None:  # the first rank speaks for all
        return
    if folder.is_done:
        folder.key.unlink(missing_ok=True)  # left over if the process was killed at its very last step
        print(f"privzoo: {folder.path} is finished already; another seed= or output_dir= makes another run.")
    from privzoo.reporting.display import final_table, print_table

    print_table(final_table(record, folder.path))


def main() -> None:
    """Entry point of `privzoo-train`."""
    run_hydra(train, "train")


if __name__ == "__main__":
    main()
