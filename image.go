package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/distribution/reference"
	kjson "sigs.k8s.io/json"
)

const (
	maxRequestBytes = 16 << 10 // body of POST /event
	maxMessageBytes = 1 << 10  // the longest reference has 255+1+128 bytes
	maxTags         = 32
)

// message is what web publishes on the PubSub channel: the image that was
// requested, and when. Nothing else ever travels there.
type message struct {
	Image       string `json:"image"`       // canonical, such as docker.io/library/nginx:latest
	RequestedAt int64  `json:"requestedAt"` // T, in microseconds since 1970; 0 means now
}

// parseRequest returns the canonical references that the body of POST /event names,
// without repetitions. Its errors tell the job in one line what to fix.
func parseRequest(body []byte) ([]string, error) {
	var req struct {
		Image string          `json:"image"`
		Tags  json.RawMessage `json:"tags"`
	}
	if err := unmarshalStrict(body, &req); err != nil {
		return nil, fmt.Errorf(`%w; expected {"image":"ghcr.io/acme/api:dev"} or {"image":"ghcr.io/acme/api","tags":["dev"]}`, err)
	}
	if req.Image == "" {
		return nil, errors.New(`image is missing or empty; expected {"image":"ghcr.io/acme/api:dev"}`)
	}
	if req.Tags == nil {
		image, err := parseImage(req.Image)
		return []string{image}, err
	}

	// Decoded apart, because null and an absent member look alike in a slice.
	var tags []string
	if err := unmarshalStrict(req.Tags, &tags); err != nil || len(tags) == 0 || len(tags) > maxTags {
		return nil, fmt.Errorf("tags must be a list of 1 to %d strings", maxTags)
	}
	named, err := parseReference(req.Image)
	if err != nil {
		return nil, err
	}
	if !reference.IsNameOnly(named) {
		return nil, fmt.Errorf("image \"%s\" has a tag or digest, and tags is given as well; give the tag in one place", sanitize(req.Image))
	}
	var images []string
	for _, tag := range tags {
		tagged, err := reference.WithTag(named, tag)
		if err != nil {
			return nil, fmt.Errorf("tag \"%s\" is not valid; expected up to 128 letters, digits and _.-, and no dot or dash first", sanitize(tag))
		}
		if image := tagged.String(); !slices.Contains(images, image) {
			images = append(images, image)
		}
	}
	return images, nil
}

// parseMessage reads a message of the PubSub channel. The worker trusts Valkey no
// more than web trusts the internet.
func parseMessage(text []byte) (m message, err error) {
	if len(text) > maxMessageBytes {
		return m, fmt.Errorf("message of %d bytes, expected at most %d", len(text), maxMessageBytes)
	}
	if err := unmarshalStrict(text, &m); err != nil {
		return m, err
	}
	if m.RequestedAt < 0 {
		return m, fmt.Errorf("requestedAt %d is before 1970", m.RequestedAt)
	}
	m.Image, err = parseImage(m.Image)
	return m, err
}

// unmarshalStrict decodes one JSON value. It refuses invalid UTF-8, unknown and
// duplicate members, names in another case, and anything after the value.
func unmarshalStrict(data []byte, v any) error {
	if !utf8.Valid(data) {
		return errors.New("the JSON is not valid UTF-8")
	}
	strict, err := kjson.UnmarshalStrict(data, v)
	if syntax, at := kjson.SyntaxErrorOffset(err); syntax {
		return fmt.Errorf("the JSON cannot be read, at byte %d: %s", at, sanitize(err.Error()))
	}
	if err != nil { // it names Go types
		return errors.New("the JSON has a value of the wrong type")
	}
	if len(strict) > 0 {
		return fmt.Errorf("the JSON is not as expected: %s", sanitize(strict[0].Error()))
	}
	return nil
}

// parseImage returns the canonical form of a reference that names a tag.
func parseImage(s string) (string, error) {
	named, err := parseReference(s)
	if err != nil {
		return "", err
	}
	if _, ok := named.(reference.Digested); ok {
		return "", fmt.Errorf("image \"%s\" has a digest: what a digest names cannot change, so there is nothing to restart for; give the tag alone", sanitize(s))
	}
	if reference.IsNameOnly(named) {
		return "", fmt.Errorf("image \"%s\" has no tag; name the tag that was pushed, such as %s:dev", sanitize(s), named.Name())
	}
	return named.String(), nil
}

// parseReference parses by the grammar that Kubernetes uses. A mebibyte would take
// long, and no valid reference has more than maxMessageBytes.
func parseReference(s string) (reference.Named, error) {
	if len(s) <= maxMessageBytes {
		if named, err := reference.ParseNormalizedNamed(s); err == nil {
			return named, nil
		}
	}
	return nil, fmt.Errorf("image \"%s\" is not a valid reference; expected registry/name:tag, the name in lower case, such as ghcr.io/acme/api:dev", sanitize(s))
}

// parseContainerImage returns the canonical form of an image of a pod template. A
// digest beside the tag pins it. ok is false for what no request can name.
func parseContainerImage(image string) (ref string, pinned, ok bool) {
	if named, err := parseReference(image); err == nil {
		_, pinned = named.(reference.Digested)
		if tagged, ok := reference.TagNameOnly(named).(reference.Tagged); ok { // adds latest to a bare name
			return named.Name() + ":" + tagged.Tag(), pinned, true
		}
	}
	return "", false, false
}

// podImages calls use with each image field of a pod spec and its pull policy. It
// walks the maps, because apimachinery's Nested functions copy what they return.
func podImages(pod map[string]any, use func(image, pullPolicy any)) {
	for _, container := range slices.Concat(children(pod, "initContainers"), children(pod, "containers")) {
		use(container["image"], container["imagePullPolicy"])
	}
	for _, volume := range children(pod, "volumes") {
		// https://kubernetes.io/docs/concepts/storage/volumes/#image
		source := child(volume, "image")
		use(source["reference"], source["pullPolicy"])
	}
}

// child returns an object within an object, nil if it is not there.
func child(m map[string]any, name string) map[string]any {
	c, _ := m[name].(map[string]any)
	return c
}

// children returns the objects of a list within an object.
func children(m map[string]any, name string) (objects []map[string]any) {
	list, _ := m[name].([]any)
	for _, item := range list {
		if object, ok := item.(map[string]any); ok {
			objects = append(objects, object)
		}
	}
	return objects
}

// imagePrefixes is ALLOWED_IMAGE_PREFIX.
type imagePrefixes []string

// parseImagePrefixes reads a comma-separated list. A prefix begins with the
// registry's host, so that nobody allows docker.io/acme by writing acme.
func parseImagePrefixes(list string) (prefixes imagePrefixes, err error) {
	for item := range strings.SplitSeq(list, ",") {
		prefix := strings.TrimSuffix(strings.TrimSpace(item), "/")
		host, _, _ := strings.Cut(prefix, "/")
		isHost := strings.ContainsAny(host, ".:") || host == "localhost"
		// Completed to a reference, the prefix gets the canonical form of the images.
		named, err := reference.ParseNormalizedNamed(prefix + "/x/y")
		if !isHost || err != nil || !reference.IsNameOnly(named) {
			return nil, errors.New("expected image prefixes that begin with the registry's host, in lower case and without a tag, such as ghcr.io/acme")
		}
		prefixes = append(prefixes, strings.TrimSuffix(named.Name(), "/x/y"))
	}
	return prefixes, nil
}

// allows compares on path boundaries: ghcr.io/acme allows ghcr.io/acme/api:dev,
// never ghcr.io/acme-evil/api:dev.
func (p imagePrefixes) allows(image string) bool {
	return slices.ContainsFunc(p, func(prefix string) bool {
		// What follows a whole repository is the tag, but what follows a host is its port.
		isRepository := strings.Contains(prefix, "/") && strings.HasPrefix(image, prefix+":")
		return isRepository || strings.HasPrefix(image, prefix+"/")
	})
}

// restartedAtLayout is the worker's own form of restartedAt: RFC 3339 in UTC with
// exactly six digits of a second.
const restartedAtLayout = "2006-01-02T15:04:05.000000Z"

// formatTime renders microseconds since 1970 as restartedAtLayout.
func formatTime(micros int64) string {
	return time.UnixMicro(micros).UTC().Format(restartedAtLayout)
}
