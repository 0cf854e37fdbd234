import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.loggers import TensorBoardLogger

from invdiff_pl.callbacks.progress import ProgressBar


def test_the_bar_does_not_show_the_stages_name_as_a_version_number(tmp_path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="classifier")
    trainer = pl.Trainer(logger=logger, accelerator="cpu")
    module = pl.LightningModule()
    assert RichProgressBar().get_metrics(trainer, module)["v_num"] == "fier"
    assert "v_num" not in ProgressBar().get_metrics(trainer, module)
