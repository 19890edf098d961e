#!/usr/bin/env bash
# The steps of .github/workflows/release.yaml. GITHUB_REPOSITORY and GITHUB_REF name the
# repository and the tag, which must be a version.
#
#   release.sh image                builds and pushes the image; its digest is an output
#   release.sh sign                 signs the image with the digest $DIGEST
#   release.sh manifests DIRECTORY  writes k8s/ with this image into two files
#   release.sh publish DIRECTORY    makes the release, with these files
set -euo pipefail
export LC_ALL=C
cd "$(dirname "$0")/.."

fail() {
  echo "::error::$1"
  exit 1
}

number='(0|[1-9][0-9]*)' identifier='[0-9A-Za-z-]+'
[[ $GITHUB_REF =~ ^refs/tags/(v$number\.$number\.$number(-$identifier(\.$identifier)*)?)$ ]] ||
  fail "the tag is not a version such as v1.2.3 or v1.2.3-rc.1"
tag=${BASH_REMATCH[1]}
# Repository names can have capitals, image names cannot.
[[ ${GITHUB_REPOSITORY,,} =~ ^[a-z0-9-]+/[a-z0-9._-]+$ ]] || fail "GITHUB_REPOSITORY is not OWNER/NAME"
image=ghcr.io/${GITHUB_REPOSITORY,,}
repository=$GITHUB_SERVER_URL/$GITHUB_REPOSITORY

need_digest() {
  [[ $DIGEST =~ ^sha256:[0-9a-f]{64}$ ]] || fail "there is no digest of the image"
}

login() {
  printf %s "$GH_TOKEN" | docker login ghcr.io --username "$GITHUB_ACTOR" --password-stdin
}

build_image() {
  local metadata=$RUNNER_TEMP/metadata.json
  # The default driver builds for one platform, and without attestations.
  docker buildx create --driver docker-container --use
  docker buildx build --platform linux/amd64,linux/arm64 --build-arg "VERSION=$tag" \
    --label "org.opencontainers.image.source=$repository" --label "org.opencontainers.image.revision=$GITHUB_SHA" \
    --sbom=true --provenance="mode=max,builder-id=$repository/actions/runs/$GITHUB_RUN_ID/attempts/$GITHUB_RUN_ATTEMPT" \
    --metadata-file "$metadata" --tag "$image:$tag" --push .
  DIGEST=$(jq -r '."containerimage.digest"' "$metadata")
}

# write_manifests DIRECTORY writes what is to be edited to config.yaml, so that the
# next release can be applied without it, and the rest to kuberollouttrigger.yaml.
write_manifests() {
  local replaced
  mkdir -p "$1"
  replaced=$(awk -v image="image: $image:$tag@$DIGEST" -v install="$1/kuberollouttrigger.yaml" -v config="$1/config.yaml" '
    function end_document(file) {
      if (document == "") return
      file = document ~ /REPLACE_ME/ ? config : install
      printf "%s%s", (documents[file]++ ? "---\n" : ""), document >file
      document = ""
    }
    FNR == 1 || $0 == "---" { end_document() }
    $0 == "---" { next }
    { replaced += sub(/image: ghcr\.io\/REPLACE_ME\/kuberollouttrigger:latest$/, image); document = document $0 "\n" }
    END { end_document(); print replaced + 0 }' k8s/*.yaml)
  [ "$replaced" = 2 ] || fail "the image is in k8s/ $replaced times, expected web and worker"
}

publish() {
  local options=()
  [[ $tag != *-* ]] || options=(--prerelease)
  gh release create "$tag" "$1/kuberollouttrigger.yaml" "$1/config.yaml" --repo "$GITHUB_REPOSITORY" \
    --verify-tag --title "$tag" "${options[@]}" --notes-file - <<EOF
The image is \`$image:$tag@$DIGEST\`.

- [Install]($repository/blob/$tag/docs/install.md), also how to verify the image and how to upgrade
- [Changes]($repository/blob/$tag/CHANGELOG.md)
EOF
}

case $1 in
image)
  login
  build_image
  need_digest
  echo "digest=$DIGEST" >>"$GITHUB_OUTPUT"
  ;;
sign)
  need_digest
  login
  # The digest is that of the index, which names the attestations by digest too.
  cosign sign --yes "$image@$DIGEST"
  ;;
manifests)
  need_digest
  write_manifests "$2"
  ;;
publish)
  need_digest
  publish "$2"
  ;;
*)
  fail "unknown step"
  ;;
esac
