"""The distribution: the package `chatd`, the bundled plugins and the configurations."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

BUNDLED_PLUGINS = [
    "anthropic",
    "echo",
    "memory",
    "openai_compatible",
    "openrouter",
    "postgres",
    "record",
    "redis",
    "replay",
    "sqlite",
    "supabase",
]


class BuildPy(build_py):
    """Puts schema.sql, which stands at the top where people look for it, into the wheel."""

    def run(self) -> None:
        """Builds, and copies it beside the configurations."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "chatd_config" / "schema.sql"
            self.copy_file("schema.sql", str(target))


setup(
    name="chatd",
    version="0.1.0",
    description="A chatbot back end: REST chat API, plugins for storage and model providers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE", "chatd/static/docs/LICENSE"],
    python_requires=">=3.11",
    cmdclass={"build_py": BuildPy},
    packages=[
        *find_packages(include=["chatd", "chatd.*"]),
        *("chatd_plugins", "chatd_plugins.redis", "chatd_plugins.sqlite", "chatd_config"),
    ],
    # The folders keep the short names of the project's layout; what is installed is prefixed,
    # so that site-packages never gets a top-level "plugins" or "config".
    package_dir={"chatd_plugins": "plugins", "chatd_config": "config"},
    package_data={
        "chatd": ["py.typed", "schemas/*.json", "static/**/*"],
        "chatd_plugins": ["py.typed"],
        "chatd_config": ["*.yaml"],
    },
    install_requires=[
        "aiohttp>=3.14,<4",
        "apsw>=3.51.3",
        "click>=8.2,<9",
        "idna>=3.7,<4",
        "jsonschema>=4.25,<5",
        "jsonschema-rs>=0.40,<1",
        "limits>=5,<6",
        "orjson>=3.10,<4",
        "pluggy>=1.6,<2",
        "postgrest>=2.20,<3",
        "prometheus_client>=0.22,<1",
        "PyJWT>=2.12,<3",
        "python-dotenv>=1.1,<2",
        "PyYAML>=6.0.2,<7",
        "tornado>=6.5.5,<7",
    ],
    extras_require={
        "postgres": ["asyncpg>=0.30,<1"],
        "otel": [
            "opentelemetry-exporter-otlp-proto-http>=1.30,<2",
            "opentelemetry-sdk>=1.30,<2",
        ],
        "redis": ["redis>=8,<9"],
        "uvloop": ["uvloop>=0.21,<1; sys_platform != 'win32'"],
    },
    entry_points={
        "console_scripts": ["chatd = chatd.cli:main"],
        "chatd": [f"{name} = chatd_plugins.{name}" for name in BUNDLED_PLUGINS],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Typing :: Typed",
    ],
)
