"""What the bias modes of a student need of its cache: rectifications, rows at a temperature."""

import msgspec

from stages.cache import LogitCache
from stages.cache.encoding import check_temperature
from stages.errors import CacheError, ConfigError
from stages.inputs.views import check_unmixed
from stages.settings import CALIBRATED, StudentConfig
from stages.targets.ensemble import NOT_RECTIFIED
from stages.training.objective import StudentLoss


def with_checked_bias(config: StudentConfig, loss: StudentLoss, cache: LogitCache) -> StudentConfig:
    """The configuration with the bias's defaults and the rectification's name filled in. config:
    its loss is complete.

    Raises ConfigError or CacheError for a bias mode or temperature that cannot be, ViewError for
    one on views that mix samples.
    """
    bias = config.bias.resolved()
    config = msgspec.structs.replace(config, bias=bias)
    if bias.mode != "none":
        check_unmixed(cache.identity.views.policy, f"bias '{bias.mode}'")
    _check_correction(config, cache)
    if bias.mode == "rectify" and config.also:
        raise ConfigError(*NOT_RECTIFIED)
    if bias.mode != "rectify":
        if bias.rectified is not None:
            raise ConfigError(
                f"rectification '{bias.rectified}' is not used with bias '{bias.mode}'",
                "Add --bias rectify, or leave --rectified out.",
            )
        return config
    name = bias.rectified or _only_rectification(cache)
    if (temperature := loss.rectified_at) is not None:
        _check_rectified_at(cache, name, temperature, config.loss.calibrate)
    return msgspec.structs.replace(config, bias=msgspec.structs.replace(bias, rectified=name))


def _check_rectified_at(cache: LogitCache, name: str, temperature: float, calibrated: bool) -> None:
    """Raise CacheError unless a rectification can be used at a temperature, of rows that are
    calibrated or as they are.
    """
    rectification = cache.rectification(name)
    if not calibrated:
        rectification.check_temperature(temperature)
        return
    settings, by = rectification.settings, cache.calibration
    named, usual = "`", f"pairwise-T{temperature:g}{CALIBRATED}"
    if usual in cache.rectifications:  # of an earlier calibration
        other = f"{usual}-{by:.4g}"
        named = f" --name {other}`, and train with --rectified {other}"
    if not settings.temperature_free and settings.temperature != temperature * by:
        raise CacheError(
            f"rectification '{name}' is of T = {settings.temperature:g}, and calibrated rows at "
            f"{temperature:g} are rows at {temperature * by:g}",
            f"Run `pipeline rectify {cache.path} --temperature {temperature:g} --calibrate{named}.",
        )


def _check_correction(config: StudentConfig, cache: LogitCache) -> None:
    """Raise ConfigError or CacheError for a corrected loss that cannot be, or settings of one that
    is not asked for.
    """
    bias = config.bias
    if bias.mode != "correct":
        given = [f"bias.{key}" for key in ("alpha", "gamma") if getattr(bias, key) is not None]
        if given:
            raise ConfigError(
                f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} not used with bias "
                f"'{bias.mode}'",
                "Add --bias correct, or leave it out.",
            )
        return
    if config.also:
        raise ConfigError(
            "bias 'correct' moves the logits of one teacher, and several are averaged",
            "Leave --also out, or use another --bias.",
        )
    check_temperature(cache.encoding, 1.0)


def _only_rectification(cache: LogitCache) -> str:
    names = cache.rectifications
    if len(names) == 1:
        return names[0]
    raise CacheError(
        f"{cache.path} has {len(names) or 'no'} rectifications"
        + (f": {', '.join(names)}" if names else ""),
        "Name one with --rectified." if names else f"Run `pipeline rectify {cache.path}` first.",
    )
