// A colour map whose steps look equally large: even in OKLab lightness, from the page's ground to what stands out.

function srgb(lightness, chroma, hue) {
  const [a, b] = [chroma * Math.cos((hue * Math.PI) / 180), chroma * Math.sin((hue * Math.PI) / 180)];
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const linear = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
  return linear.map((value) => {
    const v = Math.min(1, Math.max(0, value));
    return Math.round(255 * (v <= 0.0031308 ? 12.92 * v : 1.055 * v ** (1 / 2.4) - 0.055));
  });
}

// 256 colours as packed little-endian RGBA, lowest first; in the dark the largest glow, in the light they are ink.
export function ramp(dark) {
  const colours = new Uint32Array(256);
  for (let place = 0; place < 256; place++) {
    const t = place / 255;
    const [lightness, hue] = dark ? [0.26 + 0.66 * t, 275 - 180 * t] : [0.95 - 0.67 * t, 110 + 170 * t];
    const chroma = 0.045 + 0.085 * Math.sin(Math.PI * Math.min(1, 0.12 + 0.8 * t));
    const [red, green, blue] = srgb(lightness, chroma, hue);
    colours[place] = (255 << 24) | (blue << 16) | (green << 8) | red;
  }
  return colours;
}

export function css(packed) {
  return `rgb(${packed & 255}, ${(packed >> 8) & 255}, ${(packed >> 16) & 255})`;
}

export function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}
