# For several platforms: docker buildx build --platform linux/amd64,linux/arm64
# Go cross-compiles, so the build stage always runs on the builder's own.
FROM --platform=$BUILDPLATFORM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY *.go ./
ARG TARGETOS
ARG TARGETARCH
ARG VERSION=unversioned
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH \
    go build -trimpath -ldflags "-s -w -X main.version=$VERSION" -o /kuberollouttrigger .

# Distroless static has the CA certificates that GitHub's issuer needs.
FROM gcr.io/distroless/static:nonroot
ARG VERSION=unversioned
LABEL org.opencontainers.image.title="kuberollouttrigger" \
      org.opencontainers.image.description="Restarts the Deployments that run a container image as soon as GitHub Actions has pushed it" \
      org.opencontainers.image.version="$VERSION"
COPY --from=build /kuberollouttrigger /kuberollouttrigger
USER 65532:65532
ENTRYPOINT ["/kuberollouttrigger"]
