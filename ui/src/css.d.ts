// The builder takes style sheets as they are.
declare module '*.css';
