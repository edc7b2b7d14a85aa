#!/bin/sh
# Builds the static launcher and puts it where the Python package looks for it.
# Its own target directory keeps it from invalidating (and waiting for) the builds of the other crates.
set -eu
cd "$(dirname "$0")/../.."
target=x86_64-unknown-linux-gnu
RUSTFLAGS="-C target-feature=+crt-static" \
LIBSECCOMP_LINK_TYPE=static \
LIBSECCOMP_LIB_PATH="${LIBSECCOMP_LIB_PATH:-/usr/lib/x86_64-linux-gnu}" \
CARGO_PROFILE_RELEASE_STRIP=symbols \
CARGO_PROFILE_RELEASE_OPT_LEVEL=s \
CARGO_PROFILE_RELEASE_PANIC=abort \
    cargo build --release -p torpor-launcher --target "$target" --target-dir target-launcher "$@"
mkdir -p python/torpor/_bin
# By rename: a running container may still have the old file open.
cp "target-launcher/$target/release/torpor-launcher" python/torpor/_bin/.torpor-launcher.new
mv python/torpor/_bin/.torpor-launcher.new python/torpor/_bin/torpor-launcher
