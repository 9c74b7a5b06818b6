package docker

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
)

// A description is what is kept of an engine's answer about a container.
type description struct {
	id, name  string
	image     string // its id, sha256:…; empty if the engine says none
	imageName string // as the container was started with it
	pid       int32  // of the first process
	labels    []label
	env       []string
	digests   []string // of the image's manifests, sha256:…
	missing   error    // what was left out
}

type label struct{ key, value string }

const (
	maxDepth   = 32   // Docker's answers are about 6 deep
	maxKeys    = 4096 // of one object; also bounds the labels and variables that are looked at
	maxDigests = 32
)

var digestPattern = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

// readContainer reads the answer to GET /containers/ID/json. It reads token by token, keeps only what is needed, and takes no
// more than maxAnswerBytes. Docker and Podman write the same names; anything else of another type than theirs is an error.
func readContainer(body io.Reader) (description, error) {
	var d description
	r := newReader(body)
	err := r.object(func(key string) (err error) {
		switch key {
		case "Id":
			d.id, err = r.text()
		case "Name":
			d.name, err = r.text()
		case "Image":
			if d.image, err = r.text(); err == nil && d.image != "" {
				if !strings.Contains(d.image, ":") {
					d.image = "sha256:" + d.image
				}
				if !digestPattern.MatchString(d.image) {
					err = fmt.Errorf("%.80q is not an image's id", d.image)
				}
			}
		case "State":
			err = r.object(func(key string) (err error) {
				if key == "Pid" {
					d.pid, err = r.pid()
					return err
				}
				return r.skip()
			})
		case "Config":
			err = r.object(func(key string) (err error) {
				switch key {
				case "Image":
					d.imageName, err = r.text()
				case "Labels":
					err = r.object(func(key string) error {
						value, err := r.text()
						d.labels = append(d.labels, label{key, value})
						return err
					})
				case "Env":
					d.env, err = r.texts(maxKeys)
				default:
					err = r.skip()
				}
				return err
			})
		default:
			err = r.skip()
		}
		return err
	})
	if err != nil {
		return description{}, err
	}
	return d, nil
}

// readImage reads the digests in the answer to GET /images/ID/json: those of the manifests by which the image was had from
// a registry or is to be had.
func readImage(body io.Reader) (digests []string, err error) {
	r := newReader(body)
	err = r.object(func(key string) error {
		if key != "RepoDigests" {
			return r.skip()
		}
		names, err := r.texts(maxKeys)
		if err != nil {
			return err
		}
		seen := map[string]bool{}
		for _, name := range names {
			_, digest, _ := strings.Cut(name, "@")
			if digestPattern.MatchString(digest) && !seen[digest] && len(digests) < maxDigests {
				seen[digest] = true
				digests = append(digests, digest)
			}
		}
		return nil
	})
	return digests, err
}

// A reader reads JSON token by token.
type reader struct {
	*json.Decoder
	limit *io.LimitedReader
}

func newReader(r io.Reader) *reader {
	limit := &io.LimitedReader{R: r, N: maxAnswerBytes + 1}
	d := json.NewDecoder(limit)
	d.UseNumber()
	return &reader{d, limit}
}

// token returns the next one.
func (r *reader) token() (json.Token, error) {
	t, err := r.Token()
	switch {
	case err != nil && r.limit.N <= 0:
		return nil, fmt.Errorf("the answer is longer than %d bytes", maxAnswerBytes)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return nil, errors.New("the answer ends too early")
	case err != nil:
		return nil, fmt.Errorf("the answer is no JSON: %w", err)
	}
	return t, nil
}

// object reads an object; null is one without keys. The function reads the value of a key. A key that is there twice is
// an error, for who else reads the answer may take the other one.
func (r *reader) object(value func(key string) error) error {
	t, err := r.token()
	if err != nil || t == nil {
		return err
	}
	if t != json.Delim('{') {
		return fmt.Errorf("there is %.80v where an object should be", t)
	}
	seen := map[string]bool{}
	for r.More() {
		t, err := r.token()
		if err != nil {
			return err
		}
		key, ok := t.(string)
		if !ok || seen[key] || len(seen) == maxKeys {
			return fmt.Errorf("the key %.80v is there twice, or is one of more than %d", t, maxKeys)
		}
		seen[key] = true
		if err := value(key); err != nil {
			return err
		}
	}
	_, err = r.token()
	return err
}

// text reads a string; null is the empty one.
func (r *reader) text() (string, error) {
	t, err := r.token()
	if err != nil || t == nil {
		return "", err
	}
	s, ok := t.(string)
	if !ok {
		return "", fmt.Errorf("there is %.80v where a string should be", t)
	}
	return s, nil
}

// texts reads a list of strings.
func (r *reader) texts(most int) ([]string, error) {
	t, err := r.token()
	if err != nil || t == nil {
		return nil, err
	}
	if t != json.Delim('[') {
		return nil, fmt.Errorf("there is %.80v where a list should be", t)
	}
	var all []string
	for r.More() {
		if len(all) == most {
			return nil, fmt.Errorf("a list has more than %d strings", most)
		}
		s, err := r.text()
		if err != nil {
			return nil, err
		}
		all = append(all, s)
	}
	_, err = r.token()
	return all, err
}

func (r *reader) pid() (int32, error) {
	t, err := r.token()
	if err != nil {
		return 0, err
	}
	n, ok := t.(json.Number)
	if !ok {
		return 0, fmt.Errorf("there is %.80v where a process id should be", t)
	}
	pid, err := n.Int64()
	if err != nil || pid < 0 || pid > 1<<30 {
		return 0, fmt.Errorf("%.80s is not a process id", n)
	}
	return int32(pid), nil
}

// skip reads a value and forgets it.
func (r *reader) skip() error {
	depth := 0
	for {
		t, err := r.token()
		if err != nil {
			return err
		}
		switch t {
		case json.Delim('{'), json.Delim('['):
			if depth++; depth > maxDepth {
				return fmt.Errorf("the answer is more than %d deep", maxDepth)
			}
		case json.Delim('}'), json.Delim(']'):
			depth--
		}
		if depth == 0 {
			return nil
		}
	}
}
