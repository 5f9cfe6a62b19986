"""The codecs of ACE-Step: Oobleck (v1.5), the deep compression autoencoder and its vocoder (v1), and WAV files."""

from longburn.models.ace_step.codecs.dcae import Dcae, DcaeConfig
from longburn.models.ace_step.codecs.oobleck import Oobleck, OobleckConfig, Posterior
from longburn.models.ace_step.codecs.vocoder import Vocoder, VocoderConfig
from longburn.models.ace_step.codecs.wav import Cancelled, SampleFormat, WavWriter, Written, write_wav
from longburn.models.ace_step.codecs.wav_reader import WavReader, read_wav

__all__ = [
    "Cancelled",
    "Dcae",
    "DcaeConfig",
    "Oobleck",
    "OobleckConfig",
    "Posterior",
    "SampleFormat",
    "Vocoder",
    "VocoderConfig",
    "WavReader",
    "WavWriter",
    "Written",
    "read_wav",
    "write_wav",
]
