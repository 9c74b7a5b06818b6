package main

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"time"
)

// Media types of the OCI image specification, version 1.1.
const (
	typeIndex    = "application/vnd.oci.image.index.v1+json"
	typeManifest = "application/vnd.oci.image.manifest.v1+json"
	typeConfig   = "application/vnd.oci.image.config.v1+json"
	typeLayer    = "application/vnd.oci.image.layer.v1.tar+gzip"
	typeEmpty    = "application/vnd.oci.empty.v1+json"
	typeSPDX     = "application/spdx+json"
)

type descriptor struct {
	MediaType    string            `json:"mediaType"`
	ArtifactType string            `json:"artifactType,omitempty"`
	Digest       string            `json:"digest"`
	Size         int64             `json:"size"`
	Platform     *platform         `json:"platform,omitempty"`
	Annotations  map[string]string `json:"annotations,omitempty"`
}

type platform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
}

type index struct {
	SchemaVersion int               `json:"schemaVersion"`
	MediaType     string            `json:"mediaType"`
	Manifests     []descriptor      `json:"manifests"`
	Annotations   map[string]string `json:"annotations,omitempty"`
}

type manifest struct {
	SchemaVersion int               `json:"schemaVersion"`
	MediaType     string            `json:"mediaType"`
	ArtifactType  string            `json:"artifactType,omitempty"`
	Config        descriptor        `json:"config"`
	Layers        []descriptor      `json:"layers"`
	Subject       *descriptor       `json:"subject,omitempty"`
	Annotations   map[string]string `json:"annotations,omitempty"`
}

type imageConfig struct {
	Created      time.Time `json:"created"`
	Architecture string    `json:"architecture"`
	OS           string    `json:"os"`
	Config       runConfig `json:"config"`
	RootFS       rootFS    `json:"rootfs"`
	History      []history `json:"history"`
}

type runConfig struct {
	User       string            `json:"User"`
	Env        []string          `json:"Env"`
	Entrypoint []string          `json:"Entrypoint"`
	Cmd        []string          `json:"Cmd"`
	WorkingDir string            `json:"WorkingDir"`
	Labels     map[string]string `json:"Labels"`
}

type rootFS struct {
	Type    string   `json:"type"`
	DiffIDs []string `json:"diff_ids"`
}

type history struct {
	Created   time.Time `json:"created"`
	CreatedBy string    `json:"created_by"`
}

// A layout is an OCI image layout in a folder while it is written. Blobs are added first; the index that names them is last.
type layout struct {
	dir   string
	blobs []string // digests without sha256:, in the order in which they came
}

// newLayout begins a layout, and removes what is at its place.
func newLayout(dir string) (*layout, error) {
	if err := os.RemoveAll(dir); err != nil {
		return nil, err
	}
	return &layout{dir: dir}, os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o755)
}

func (l *layout) add(mediaType string, data []byte) (descriptor, error) {
	sum := digest(data)
	d := descriptor{MediaType: mediaType, Digest: "sha256:" + sum, Size: int64(len(data))}
	file := l.blob(sum)
	if _, err := os.Stat(file); err == nil {
		return d, nil
	}
	l.blobs = append(l.blobs, sum)
	return d, os.WriteFile(file, data, 0o644)
}

func (l *layout) addJSON(mediaType string, v any) (descriptor, error) {
	data, err := json.Marshal(v) // the keys of maps are sorted
	if err != nil {
		return descriptor{}, err
	}
	return l.add(mediaType, data)
}

func (l *layout) blob(sum string) string { return filepath.Join(l.dir, "blobs", "sha256", sum) }

// layoutFile is the file oci-layout.
const layoutFile = `{"imageLayoutVersion":"1.0.0"}`

// finish writes the index of the layout.
func (l *layout) finish(named []descriptor) error {
	data, err := json.Marshal(index{SchemaVersion: 2, MediaType: typeIndex, Manifests: named})
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(l.dir, "oci-layout"), []byte(layoutFile), 0o644),
		os.WriteFile(filepath.Join(l.dir, "index.json"), data, 0o644),
	)
}

// archive writes what top leads to as one file. It leaves out what refers to the image: some engines load archives with one
// image only.
func (l *layout) archive(file string, top descriptor, at time.Time) (err error) {
	data, err := json.Marshal(index{SchemaVersion: 2, MediaType: typeIndex, Manifests: []descriptor{top}})
	if err != nil {
		return err
	}
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := tar.NewWriter(f)
	entry := func(name string, data []byte) error { return writeFile(w, name, 0o644, data, at) }
	if err := errors.Join(entry("oci-layout", []byte(layoutFile)), entry("index.json", data)); err != nil {
		return err
	}
	for _, dir := range []string{"blobs/", "blobs/sha256/"} {
		if err := w.WriteHeader(header(dir, tar.TypeDir, 0o755, 0, at)); err != nil {
			return err
		}
	}
	reached, err := l.reached(top, map[string]bool{})
	if err != nil {
		return err
	}
	for _, sum := range l.blobs {
		if !reached[sum] {
			continue
		}
		data, err := os.ReadFile(l.blob(sum))
		if err != nil {
			return err
		}
		if err := entry(path.Join("blobs/sha256", sum), data); err != nil {
			return err
		}
	}
	return w.Close()
}

// reached are the blobs that d leads to, itself among them.
func (l *layout) reached(d descriptor, seen map[string]bool) (map[string]bool, error) {
	sum := d.Digest[len("sha256:"):]
	seen[sum] = true
	if d.MediaType != typeIndex && d.MediaType != typeManifest {
		return seen, nil
	}
	data, err := os.ReadFile(l.blob(sum))
	if err != nil {
		return nil, err
	}
	var next struct {
		Manifests, Layers []descriptor
		Config            *descriptor
	}
	if err := json.Unmarshal(data, &next); err != nil {
		return nil, fmt.Errorf("blob %s: %w", sum, err)
	}
	if next.Config != nil {
		next.Layers = append(next.Layers, *next.Config)
	}
	for _, d := range append(next.Manifests, next.Layers...) {
		if _, err := l.reached(d, seen); err != nil {
			return nil, err
		}
	}
	return seen, nil
}

func digest(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// header is an entry of an archive that says nothing about who made it, where and when.
func header(name string, kind byte, mode, size int64, at time.Time) *tar.Header {
	return &tar.Header{Typeflag: kind, Name: name, Mode: mode, Size: size, ModTime: at, Format: tar.FormatPAX}
}

// writeFile adds a file to an archive.
func writeFile(w *tar.Writer, name string, mode int64, data []byte, at time.Time) error {
	if err := w.WriteHeader(header(name, tar.TypeReg, mode, int64(len(data)), at)); err != nil {
		return err
	}
	_, err := w.Write(data)
	return err
}
