#!/usr/bin/env bash
# Debian's Chromium for the tests of reports; does nothing where a Chromium is installed. `make test` runs it.
set -euo pipefail
have() { for name in chromium chromium-browser google-chrome; do ! command -v "$name" >/dev/null || return 0; done; return 1; }
if have; then exit 0; fi
if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
  echo "error: tests/report needs Chromium; install the package chromium (as root: apt-get install chromium)" >&2
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
timeout 300 apt-get update -qq || echo "warning: apt-get update failed; trying with the lists that are there" >&2
timeout 300 apt-get install -y -qq --no-install-recommends chromium >/dev/null
have
