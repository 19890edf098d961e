package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/distribution/reference"
	kjson "sigs.k8s.io/json"
)

const (
	maxRequestBytes = 16 << 10 // body of POST /event
	maxEventBytes   = 1 << 10  // PubSub message: the longest reference is 255+1+128 bytes
	maxTags         = 32
)

// event says that an image was asked for at a time. Its JSON is the message on
// the PubSub channel, and all that ever travels there.
type event struct {
	// Image is a canonical reference with a tag, such as
	// docker.io/library/nginx:latest.
	Image string `json:"image"`
	// RequestedAt is T of the design: microseconds since 1970 on Valkey's
	// clock. 0 in a message means now.
	RequestedAt int64 `json:"requestedAt"`
}

// parseRequest reads the body of POST /event and returns the canonical
// references it asks for, without repetitions. Its errors are for the job: one
// line that says what is wrong and how to mend it.
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
		if err != nil {
			return nil, err
		}
		return []string{image}, nil
	}

	// A second decoder, because null and an absent member look alike in a slice.
	var tags []string
	if err := unmarshalStrict(req.Tags, &tags); err != nil || len(tags) == 0 || len(tags) > maxTags {
		return nil, fmt.Errorf("tags must be a list of 1 to %d strings", maxTags)
	}
	named, err := parseNamed(req.Image)
	if err != nil {
		return nil, err
	}
	if !reference.IsNameOnly(named) {
		return nil, fmt.Errorf("image %q has a tag or digest, and tags is given as well; give the tag in one place", cut(req.Image))
	}
	var images []string
	for _, tag := range tags {
		tagged, err := reference.WithTag(named, tag)
		if err != nil {
			return nil, fmt.Errorf("tag %q is not valid; expected 1 to 128 letters, digits, underscores, dots or dashes, not beginning with a dot or dash", cut(tag))
		}
		if image := tagged.String(); !slices.Contains(images, image) {
			images = append(images, image)
		}
	}
	return images, nil
}

// parseEvent reads a message of the PubSub channel. worker trusts Valkey no
// more than web trusts the internet: a message is parsed as strictly, and its
// image checked as web checked it. The image is returned in canonical form.
func parseEvent(message []byte) (event, error) {
	var e event
	if len(message) > maxEventBytes {
		return e, fmt.Errorf("message of %d bytes; at most %d are read", len(message), maxEventBytes)
	}
	if err := unmarshalStrict(message, &e); err != nil {
		return e, err
	}
	if e.RequestedAt < 0 {
		return e, fmt.Errorf("requestedAt %d is before 1970", e.RequestedAt)
	}
	var err error
	e.Image, err = parseImage(e.Image)
	return e, err
}

// unmarshalStrict decodes one JSON value: valid UTF-8, no unknown member, none
// in another case, none twice, nothing after it.
func unmarshalStrict(data []byte, v any) error {
	if !utf8.Valid(data) {
		return errors.New("the JSON is not valid UTF-8")
	}
	strict, err := kjson.UnmarshalStrict(data, v)
	if syntax, at := kjson.SyntaxErrorOffset(err); syntax {
		return fmt.Errorf("the JSON cannot be read, at byte %d: %s", at, cut(err.Error()))
	}
	if err != nil { // which speaks of Go's types
		return errors.New("the JSON has a value of the wrong type")
	}
	if len(strict) > 0 {
		return fmt.Errorf("the JSON is not as expected: %s", cut(strict[0].Error()))
	}
	return nil
}

// parseImage returns the canonical form of a reference that names a tag.
func parseImage(s string) (string, error) {
	named, err := parseNamed(s)
	if err != nil {
		return "", err
	}
	if _, ok := named.(reference.Tagged); !ok {
		return "", fmt.Errorf("image %q has no tag; say which tag was pushed, such as %s:dev", cut(s), named.Name())
	}
	return named.String(), nil
}

// parseNamed parses a reference by the grammar of distribution, the one that
// Kubernetes itself uses, and refuses digests.
func parseNamed(s string) (reference.Named, error) {
	named, err := reference.ParseNormalizedNamed(s)
	if err != nil {
		if _, err := reference.ParseNormalizedNamed(strings.ToLower(s)); err == nil {
			// As ${{ github.repository }} of an owner like Acme.
			return nil, fmt.Errorf("image %q: the name must be in lower case", cut(s))
		}
		return nil, fmt.Errorf("image %q is not a valid reference; expected registry/name:tag, such as ghcr.io/acme/api:dev", cut(s))
	}
	if _, ok := named.(reference.Digested); ok {
		return nil, fmt.Errorf("image %q has a digest: what a digest names cannot change, so there is nothing to restart for; give the tag alone", cut(s))
	}
	return named, nil
}

// cut bounds what of a request is repeated in errors and logs.
func cut(s string) string {
	const most = 200
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}

// containerImage is an image field of a pod template as the matcher sees it.
type containerImage struct {
	// ref is canonical, with its tag; what it names is what an event names.
	ref string
	// pinned: a digest stands beside the tag, so the tag is only decoration.
	pinned bool
	// pullPolicy is what makes a node pull again. Only Always does so for a tag
	// that the node has cached.
	pullPolicy string
}

// parseContainerImage canonicalises an image field of a pod template. ok is
// false for what no event can name: an invalid reference, or a bare digest.
func parseContainerImage(image, pullPolicy string) (c containerImage, ok bool) {
	named, err := reference.ParseNormalizedNamed(image)
	if err != nil {
		return c, false
	}
	_, pinned := named.(reference.Digested)
	if !pinned {
		named = reference.TagNameOnly(named) // no tag means latest
	}
	tagged, ok := named.(reference.Tagged)
	if !ok {
		return c, false
	}
	return containerImage{named.Name() + ":" + tagged.Tag(), pinned, pullPolicy}, true
}

// imagePrefixes is ALLOWED_IMAGE_PREFIX.
type imagePrefixes []string

var portRE = regexp.MustCompile(`:[0-9]+$`)

// parseImagePrefixes reads a comma-separated list. A prefix begins with the
// registry's host, so that nobody allows docker.io/acme by writing acme.
func parseImagePrefixes(list string) (imagePrefixes, error) {
	var prefixes imagePrefixes
	for item := range strings.SplitSeq(list, ",") {
		prefix := strings.TrimSuffix(strings.TrimSpace(item), "/")
		host, _, _ := strings.Cut(prefix, "/")
		if !strings.Contains(host, ".") && !portRE.MatchString(host) && host != "localhost" {
			return nil, errors.New("expected image prefixes that begin with the registry's host, such as ghcr.io/acme")
		}
		// Completed to a reference and parsed, the prefix gets the same
		// canonical form as the images that it is compared with.
		named, err := reference.ParseNormalizedNamed(prefix + "/x/y")
		if err != nil || !reference.IsNameOnly(named) {
			return nil, errors.New("expected image prefixes in lower case without tag, such as ghcr.io/acme")
		}
		prefixes = append(prefixes, strings.TrimSuffix(named.Name(), "/x/y"))
	}
	return prefixes, nil
}

// allows compares on path boundaries: ghcr.io/acme allows ghcr.io/acme/api:dev,
// never ghcr.io/acme-evil/api:dev.
func (p imagePrefixes) allows(image string) bool {
	for _, prefix := range p {
		rest, ok := strings.CutPrefix(image, prefix)
		if !ok {
			continue
		}
		// A prefix may be a whole repository; what then follows is the tag. A
		// bare host is followed by a path, never by what would be its port.
		if strings.HasPrefix(rest, "/") || strings.Contains(prefix, "/") && strings.HasPrefix(rest, ":") {
			return true
		}
	}
	return false
}

// restartedAtLayout is how worker writes a restart's time: RFC 3339 in UTC with
// exactly six digits of a second. A value in this form is worker's own.
const restartedAtLayout = "2006-01-02T15:04:05.000000Z"

// formatTime renders microseconds since 1970 as restartedAtLayout.
func formatTime(micros int64) string {
	return time.UnixMicro(micros).UTC().Format(restartedAtLayout)
}
